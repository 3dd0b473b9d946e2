"""What each rank does when, as it happens: a file that chrome://tracing and Perfetto show.

The format is that of Horovod's own timeline: the array form of Chrome's trace events, one row a tensor.
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
from hvdtrain.timeline.trace_format import Event, TraceError, native_events

# Starts an engine's own recording to a path; returns what ends it, or None where the engine has none.
Native = Callable[[Path, bool], Callable[[], None] | None]

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_END = b"\n]\n"
# One write takes at most 2 GiB.
_AT_ONCE = 1 << 20


@dataclass
class _Row:
    """Where slices are drawn; those of one thread nest, so a row belongs to one thread at a time."""

    pid: int
    tid: int
    thread: int | None = None
    depth: int = 0


@final
class Timeline:
    """Records what this rank does, so that one sees which rank the others wait for, and for what.

    Each event is in the file as soon as it has happened, and the file is whole after each: nothing is lost
    when the process is killed, and what it was doing then is the slice that has not ended. A disk that
    fills up ends the recording with one sentence, never the training.

    Args:
        path: The file of rank 0; rank r writes `<stem>.rank<r><suffix>` beside it.
        rank: This process's number.
        mark_cycles: Whether to mark each negotiation's start with CYCLE_START.
        native: Starts the engine's own recording; what that holds is added to this file by `close()`.
        size: How many ranks record, so that a file that an earlier run left beside is not taken for one of theirs.

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
            self._end = self._write(0, b"[\n" + _line(self._head(size)))
        except OSError as error:
            raise OSError(
                error.errno, f"Rank {rank}: the timeline cannot be written ({error.strerror})", str(self.path)
            ) from error
        self._native_path = native_path_of(self.path)
        with suppress(OSError):
            self._native_path.unlink()  # of an earlier run that was killed
        self._stop_native = native(self._native_path, mark_cycles) if native else None
        atexit.register(self.close)

    @contextmanager
    def span(self, tensor: str, phase: str) -> Iterator[None]:
        """Draws a slice from here to the end of the `with` block; slices inside it nest.

        Args:
            tensor: The row, named as Horovod names its tensors.
            phase: What happens to it: NEGOTIATE_ALLREDUCE, ALLREDUCE, MPI_ALLREDUCE …
        """
        row = self._begin(tensor, phase)
        try:
            yield
        finally:
            self._finish(row)

    def close(self) -> None:
        """Ends the recording; what follows is not recorded. A second call changes nothing."""
        stop, self._stop_native = self._stop_native, None
        if stop is not None and os.getpid() == self._process:
            stop()
            self._take_native()
        with self._lock:
            self._file.close()
        atexit.unregister(self.close)

    def _begin(self, tensor: str, phase: str) -> _Row:
        with self._lock:
            row, new = self._row(tensor)
            row.thread, row.depth = threading.get_ident(), row.depth + 1
            if self._mark_cycles and phase.startswith("NEGOTIATE_"):
                new.append(
                    {"name": "CYCLE_START", "ph": "i", "s": "g", "ts": self._now(), "pid": 0, "tid": 0}
                )
            begin = {"name": phase, "ph": "B", "ts": self._now(), "pid": row.pid, "tid": row.tid}
            self._append([*new, begin])
            return row

    def _finish(self, row: _Row) -> None:
        with self._lock:
            row.depth -= 1
            row.thread = row.thread if row.depth else None
            self._append([{"ph": "E", "ts": self._now(), "pid": row.pid, "tid": row.tid}])

    def _row(self, tensor: str) -> tuple[_Row, list[Event]]:
        """Finds the tensor's row that no other thread draws on, and what names it where it is new."""
        rows = self._rows.setdefault(tensor, [])
        for row in rows:
            if row.thread in (None, threading.get_ident()):
                return row, []
        pid = rows[0].pid if rows else len(self._rows)
        rows.append(_Row(pid, len(rows)))
        return rows[-1], [] if len(rows) > 1 else _named(pid, tensor)

    def _append(self, events: Sequence[Event]) -> None:
        """Writes over the end of the file, so that it has an end again; the caller holds the lock."""
        # A forked process, such as a data loader's worker, has this file open too; it is not its to write.
        if self._file.closed or os.getpid() != self._process:
            return
        try:
            self._end = self._write(self._end, b"".join(b",\n" + _line(event) for event in events))
        except OSError as error:
            self._file.close()
            logger.error(
                f"rank {self._rank}: the timeline {self.path} ends here ({error.strerror}); the training goes on."
            )

    def _write(self, offset: int, data: bytes) -> int:
        """Writes at an offset, and the end of the file after it; returns where that end begins."""
        if os.pwrite(self._file.fileno(), data + _END, offset) < len(data + _END):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return offset + len(data)

    def _take_native(self) -> None:
        """Moves what the engine's core has recorded into this file, in this file's time."""
        try:
            events = native_events(self._native_path, self._epoch / 1000, len(self._rows))
            self._native_path.unlink()
        except (OSError, TraceError) as error:
            logger.error(f"Horovod's own phases are missing in {self.path}: {self._native_path} {error}.")
            return
        with self._lock:
            for start in range(0, len(events), _AT_ONCE):
                self._append(events[start : start + _AT_ONCE])

    def _now(self) -> float:
        return (time.monotonic_ns() - self._started) / 1000

    def _head(self, size: int | None) -> Event:
        """Says whose file this is, and when it starts on the clocks that other ranks can compare with theirs."""
        host = socket.gethostname()
        about = {
            "name": f"rank {self._rank} ({host})",
            "start_time_since_epoch_in_micros": self._epoch // 1000,
            "rank": self._rank,
            "size": size,
            "host": host,
            # Processes of one boot share its monotonic clock, whatever their host name.
            "clock": _BOOT.read_text().strip() if _BOOT.is_file() else host,
            "start_on_clock_in_micros": self._started / 1000,
        }
        return {"name": "process_name", "ph": "M", "pid": 0, "args": about}


def path_of(path: str | os.PathLike, rank: int) -> Path:
    """Returns the file of a rank, wherever the script goes; that of rank 0 is `path` itself."""
    first = Path(path).absolute()
    return first.with_name(f"{first.stem}.rank{rank}{first.suffix}") if rank else first


def native_path_of(path: Path) -> Path:
    """Returns the file in which an engine's own core records, until `Timeline.close` takes it over."""
    return path.with_name(f"{path.stem}.native{path.suffix}")


def _named(pid: int, tensor: str) -> list[Event]:
    return [
        {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": tensor}},
        {"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": pid}},
    ]


def _line(event: Event) -> bytes:
    return json.dumps(event).encode()
