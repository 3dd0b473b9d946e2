"""Relay the output of a rank and report how it ends, in a guard process between the MPI launcher and the rank.

The guard is the parent process of the rank. So even after `kill -9` it can read the last output and the exact exit
status of the rank, under every MPI.
"""

import contextlib
import json
import mmap
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.rank_monitor import RankMonitor

RELAYED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
PATIENCE = 2.0  # seconds between SIGTERM and SIGKILL for a rank, unless it has requested more
CHUNK = 65536
_KEPT = 4096  # bytes kept of a quiet rank's standard error


class Pipes(NamedTuple):
    """The guard's ends of the pipes to its rank."""

    stdout: int
    stderr: int
    reports: int  # the result of the script, as one line of JSON
    crash: int  # the Python stack that faulthandler writes when a signal kills the rank
    stacks: int  # the stacks of all threads that faulthandler writes on request
    receipt: int  # on which the guard confirms that it has sent a report


class Terminal:
    """The guard's own output, used if there is no launcher or it cannot be reached; lines begin with `[rank]`.

    Args:
        rank: The rank; lines of rank 0 get no prefix.
        size: The number of ranks, for the message about a failure; None if unknown.
        records: Whether a launcher reads this output, so that reports are written as records.
    """

    socket = None  # no launcher sends orders

    def __init__(self, rank: int, size: int | None, records: bool) -> None:
        self._rank, self._size, self._records = rank, size, records
        self._rest = {protocol.STDOUT: b"", protocol.STDERR: b""}

    def send(self, kind: bytes, payload: bytes) -> None:
        """Write lines of a stream, or a report as a record or as a message."""
        if kind in self._rest:
            self._write_lines(kind, payload)
        elif self._records:
            self._finish()
            record = {"rank": self._rank, "kind": kind.decode(), "payload": payload.decode()}
            self._write(protocol.STDOUT, protocol.RECORD + json.dumps(record).encode() + b"\n")
        elif kind == protocol.EXIT:
            self._finish()
        elif kind == protocol.REPORT:
            self._print_failure(json.loads(payload))

    def _finish(self) -> None:
        for kind, rest in self._rest.items():
            if rest:
                self._write_lines(kind, b"\n")

    def _write_lines(self, kind: bytes, payload: bytes) -> None:
        *lines, rest = (self._rest[kind] + payload).split(b"\n")
        prefix = b"[%d] " % self._rank if self._rank else b""
        shown = b"".join(prefix + line + b"\n" for line in lines)
        # Rank 0's progress bar must be shown before its line ends.
        if self._rank == 0 and b"\r" in rest:
            shown, rest = shown + rest, b""
        self._rest[kind] = rest
        self._write(kind, shown)

    def _write(self, kind: bytes, data: bytes) -> None:
        stream = sys.stderr if kind == protocol.STDERR and not self._records else sys.stdout
        with contextlib.suppress(OSError):
            stream.buffer.write(data)
            stream.buffer.flush()

    def _print_failure(self, report: dict) -> None:
        if not report["done"]:
            of_size = f" of {self._size}" if self._size else ""
            reason = "\n" + report["traceback"] if report["traceback"] else report["text"] + "\n"
            message = f"hvdtrain: rank {self._rank}{of_size} failed: {reason}"
            self._write(protocol.STDERR, message.encode(errors="replace"))


# Where a guard sends its frames.
Link = protocol.Connection | Terminal


class Guard:
    """Watch one rank until it has ended.

    Args:
        child: The rank's process id.
        pipes: The pipes to the rank.
        link: The destination of the rank's output and reports.
        page: The rank's heartbeat page.
        quiet: Whether to send the end of its standard error only if it fails without a report.
    """

    def __init__(self, child: int, pipes: Pipes, link: Link, page: mmap.mmap, quiet: bool) -> None:
        self._child, self._pipes, self._link = child, pipes, link
        self._quiet, self._kept, self._reported = quiet, bytearray(), False
        self._monitor = RankMonitor(child, page, pipes.stacks, link.send)
        self._status: int | None = None
        self._kill_at: float | None = None
        self._end_ordered = False
        self._crash = bytearray()
        self._selector = selectors.DefaultSelector()
        signal.pthread_sigmask(signal.SIG_BLOCK, RELAYED)
        self._listen()

    def watch(self) -> int:
        """Relay output and signals until the rank has ended; return its exit code, or minus its signal."""
        while self._status is None:
            for key, _ in self._selector.select(timeout=0.1):
                key.data()
            self._relay_signals()
            if self._link.socket is not None:
                self._monitor.check()
            if self._kill_at and time.monotonic() > self._kill_at:
                self._signal(signal.SIGKILL)
            ended, status = os.waitpid(self._child, os.WNOHANG)
            if ended:
                self._status = os.waitstatus_to_exitcode(status)
        self._read_reports()
        self._read_crash()
        self._monitor.send_last()
        if self._kept and self._status and not self._reported:
            self._link.send(protocol.STDERR, bytes(self._kept))
        exit_record = {"status": self._status, "crash": self._crash.decode(errors="replace")}
        self._link.send(protocol.EXIT, json.dumps(exit_record).encode())
        return self._status

    def _listen(self) -> None:
        readers = {
            self._pipes.stdout: self._read_streams,
            self._pipes.stderr: self._read_streams,
            self._pipes.reports: self._read_reports,
            self._pipes.crash: self._read_crash,
            self._pipes.stacks: self._read_stacks,
        }
        for pipe, reader in readers.items():
            os.set_blocking(pipe, False)
            self._selector.register(pipe, selectors.EVENT_READ, reader)
        if self._link.socket is not None:
            self._selector.register(self._link.socket, selectors.EVENT_READ, self._read_orders)

    def _read_streams(self) -> None:
        self._drain(self._pipes.stdout, lambda data: self._link.send(protocol.STDOUT, data))
        self._drain(self._pipes.stderr, self._send_errors)

    def _send_errors(self, data: bytes) -> None:
        if self._quiet:
            self._kept += data
            del self._kept[:-_KEPT]
        else:
            self._link.send(protocol.STDERR, data)

    def _read_reports(self) -> None:
        # Output that was written before the report is sent before it.
        self._read_streams()
        self._drain(self._pipes.reports, self._send_reports)

    def _read_crash(self) -> None:
        self._drain(self._pipes.crash, self._crash.extend)

    def _read_stacks(self) -> None:
        if not self._monitor.read_stacks():
            self._forget(self._pipes.stacks)

    def _send_reports(self, data: bytes) -> None:
        self._reported = True
        while not data.endswith(b"\n"):
            os.set_blocking(self._pipes.reports, True)
            more = os.read(self._pipes.reports, CHUNK)
            os.set_blocking(self._pipes.reports, False)
            if not more:
                return
            data += more
        for line in data.splitlines():
            self._link.send(protocol.REPORT, line)
            with contextlib.suppress(OSError):
                os.write(self._pipes.receipt, b".")

    def _drain(self, pipe: int, take: Callable[[bytes], object]) -> None:
        # Bounded, because a child process of the rank may keep the pipe open and write forever.
        for _ in range(16):
            try:
                data = os.read(pipe, CHUNK)
            except BlockingIOError:
                return
            if not data:
                self._forget(pipe)
                return
            take(data)

    def _forget(self, source: int | socket.socket) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(source)

    def _read_orders(self) -> None:
        assert self._link.socket is not None
        try:
            orders = self._link.socket.recv(64)
        except OSError:
            orders = b""
        for order in orders:
            if order == protocol.LOOK:
                self._monitor.request_stacks()
            elif order == protocol.END:
                self._end_ordered = True
            else:
                self._signal(order)
        if not orders:
            self._forget(self._link.socket)
            self._signal(signal.SIGTERM)
            # A launcher that orders the end has already waited for the time that the rank has requested.
            requested = 0.0 if self._end_ordered else self._monitor.patience
            self._kill_at = time.monotonic() + max(PATIENCE, requested)

    def _relay_signals(self) -> None:
        while (caught := signal.sigtimedwait(RELAYED, 0)) is not None:
            # The MPI launcher, our parent, signals the whole process group: the rank has received that signal too.
            if caught.si_pid != os.getppid():
                self._signal(caught.si_signo)

    def _signal(self, number: int) -> None:
        if self._status is None:
            os.kill(self._child, number)
