"""Write what a rank does, while it runs, to a file that chrome://tracing and Perfetto show.

The format is that of Horovod's own timeline: the array form of Chrome's trace events, one row for each tensor.
"""

import atexit
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from hvdtrain.messages import logger
from hvdtrain.timeline.recordings import Event, TraceError, native_events, native_path_of, path_of

# Starts an engine's own recording to a path; returns the function that ends it, or None if the engine has none.
Native = Callable[[Path, bool], Callable[[], None] | None]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_END = b"\n]\n"
# Events in one write, because Linux writes at most 2 GiB at once.
_EVENTS_PER_WRITE = 1 << 20


@dataclass
class _Row:
    """A row of slices. Slices of one thread nest, so a row belongs to one thread at a time."""

    pid: int
    tid: int
    thread: int | None = None
    depth: int = 0


@final
class Timeline:
    """Records what this rank does, to see which rank the others wait for, and in which collective.

    Each event is written as soon as it has happened, and the file is valid JSON after each event: if the process
    is killed, nothing is lost, and the operation that was running is the slice without an end. If the disk is full,
    the recording ends with a message, and the training continues.

    Args:
        path: The file of rank 0; rank r writes `<stem>.rank<r><suffix>` beside it.
        rank: This process's rank.
        mark_cycles: Whether to mark the start of each negotiation with CYCLE_START.
        native: Starts the engine's own recording; `close()` adds its events to this file.
        size: Number of ranks, so that `merge` can recognize files of an earlier run with more ranks.

    Raises:
        OSError: If the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        rank: int,
        mark_cycles: bool = False,
        native: Native | None = None,
        size: int | None = None,
    ) -> None:
        self.path = path_of(path, rank)
        self._rank = rank
        self._mark_cycles = mark_cycles
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._rows: dict[str, list[_Row]] = {}
        self._started, self._epoch = time.monotonic_ns(), time.time_ns()
        try:
            self._file = self.path.open("wb", buffering=0)
            self._end = self._write(0, b"[\n" + _encode(self._header(size)))
        except OSError as error:
            raise OSError(
                error.errno, f"Rank {rank}: the timeline cannot be written ({error.strerror})", str(self.path)
            ) from error
        self._native_path = native_path_of(self.path)
        with suppress(OSError):
            self._native_path.unlink()  # left by an earlier run that was killed
        self._stop_native = native(self._native_path, mark_cycles) if native else None
        atexit.register(self.close)

    @contextmanager
    def span(self, tensor: str, phase: str) -> Iterator[None]:
        """Record a slice that lasts until the end of the `with` block; slices inside of it are nested.

        Args:
            tensor: Name of the row, which is the name of the tensor in Horovod.
            phase: Name of the slice: NEGOTIATE_ALLREDUCE, ALLREDUCE, MPI_ALLREDUCE …
        """
        with self._lock:
            row, events = self._row(tensor)
            row.thread, row.depth = threading.get_ident(), row.depth + 1
            if self._mark_cycles and phase.startswith("NEGOTIATE_"):
                cycle = {"name": "CYCLE_START", "ph": "i", "s": "g", "ts": self._now(), "pid": 0, "tid": 0}
                events.append(cycle)
            events.append({"name": phase, "ph": "B", "ts": self._now(), "pid": row.pid, "tid": row.tid})
            self._append(events)
        try:
            yield
        finally:
            with self._lock:
                row.depth -= 1
                row.thread = row.thread if row.depth else None
                self._append([{"ph": "E", "ts": self._now(), "pid": row.pid, "tid": row.tid}])

    def close(self) -> None:
        """End the recording. Later spans are not recorded, and a second call does nothing."""
        stop, self._stop_native = self._stop_native, None
        if stop is not None and os.getpid() == self._process:
            stop()
            self._move_native_events()
        with self._lock:
            self._file.close()
        atexit.unregister(self.close)

    def _row(self, tensor: str) -> tuple[_Row, list[Event]]:
        """Return a row of the tensor that no other thread uses, and the events that name a new row."""
        rows = self._rows.setdefault(tensor, [])
        for row in rows:
            if row.thread in (None, threading.get_ident()):
                return row, []
        pid = rows[0].pid if rows else len(self._rows)
        rows.append(_Row(pid, len(rows)))
        if len(rows) > 1:
            return rows[-1], []
        return rows[-1], [
            {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": tensor}},
            {"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": pid}},
        ]

    def _append(self, events: Sequence[Event]) -> None:
        """Overwrite the closing bracket by events and a new closing bracket; the caller holds the lock."""
        # A forked process, such as a worker of a data loader, has this file open too and must not write to it.
        if self._file.closed or os.getpid() != self._process:
            return
        try:
            self._end = self._write(self._end, b"".join(b",\n" + _encode(event) for event in events))
        except OSError as error:
            self._file.close()
            ends = f"the timeline {self.path} ends here ({error.strerror})"
            logger.error(f"rank {self._rank}: {ends}; the training continues.")

    def _write(self, offset: int, data: bytes) -> int:
        """Write data and the closing bracket at an offset; return the offset of the closing bracket."""
        if os.pwrite(self._file.fileno(), data + _END, offset) < len(data + _END):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return offset + len(data)

    def _move_native_events(self) -> None:
        """Move the events that the engine's core has recorded into this file, with times relative to its start."""
        try:
            events = native_events(self._native_path, self._epoch / 1000, len(self._rows))
            self._native_path.unlink()
        except (OSError, TraceError) as error:
            logger.error(f"Horovod's own phases are missing in {self.path}: {self._native_path} {error}.")
            return
        with self._lock:
            for start in range(0, len(events), _EVENTS_PER_WRITE):
                self._append(events[start : start + _EVENTS_PER_WRITE])

    def _now(self) -> float:
        return (time.monotonic_ns() - self._started) / 1000

    def _header(self, size: int | None) -> Event:
        """Return the event that holds rank, host, and the start time on the clocks that ranks can compare."""
        host = socket.gethostname()
        args = {
            "name": f"rank {self._rank} ({host})",
            "start_time_since_epoch_in_micros": self._epoch // 1000,
            "rank": self._rank,
            "size": size,
            "host": host,
            # All processes since one boot share the monotonic clock, also in containers with another host name.
            "clock": _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else host,
            "start_on_clock_in_micros": self._started / 1000,
        }
        return {"name": "process_name", "ph": "M", "pid": 0, "args": args}


def _encode(event: Event) -> bytes:
    return json.dumps(event).encode()
