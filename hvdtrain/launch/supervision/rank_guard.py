"""The process between the MPI launcher and a rank: it relays the rank's output and sees how the rank ends.

It is the rank's parent, so whatever becomes of the rank, by `kill -9` too, its last words are read and
its exit status is known exactly, under every MPI.
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
from dataclasses import dataclass
from typing import Protocol

from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.rank_monitor import Pulse

RELAYED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
PATIENCE = 2.0  # seconds between asking a rank to end and ending it, where it asks for no more
LOST = 30.0  # seconds after which what a lost host was sent is no longer tried again
CHUNK = 65536
_KEPT = 4096  # bytes of a quiet rank's last words


@dataclass(frozen=True)
class Pipes:
    """The guard's ends of the pipes to its rank.

    Args:
        stdout: What the rank prints.
        stderr: What it prints there.
        reports: How its script ended, a line of JSON.
        crash: The Python stack that faulthandler writes when a signal kills it.
        stacks: The stacks of all threads that faulthandler writes when it is asked for them.
        receipt: Where the guard answers that a report is on its way.
    """

    stdout: int
    stderr: int
    reports: int
    crash: int
    stacks: int
    receipt: int


class Link(Protocol):
    """Where a guard sends its frames."""

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send one frame."""

    def receiver(self) -> socket.socket | None:
        """Return the socket through which the launcher answers, if there is one."""


class Connection:
    """The usual link: a TCP connection to the launcher."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send one frame; a launcher that is gone shows in `receiver()`, not here."""
        with contextlib.suppress(OSError):
            self._socket.sendall(protocol.pack(kind, payload))

    def receiver(self) -> socket.socket | None:
        """Return the socket through which the launcher answers."""
        return self._socket


class Terminal:
    """The link where no launcher can be reached: the guard's own output, `[rank]` before each line.

    Args:
        rank: The rank whose lines these are; those of rank 0 stay as they are.
        size: How many ranks there are, for the sentence about a failure.
        records: Whether a launcher reads this output, which then also wants reports as records.
    """

    def __init__(self, rank: int, size: int | None, records: bool) -> None:
        self._rank, self._size, self._records = rank, size, records
        self._rest = {protocol.STDOUT: b"", protocol.STDERR: b""}

    def send(self, kind: bytes, payload: bytes) -> None:
        """Write a stream's lines, or a report as a record or as a sentence."""
        if kind in self._rest:
            self._write_lines(kind, payload)
        elif self._records:
            self._finish()
            record = {"rank": self._rank, "kind": kind.decode(), "payload": payload.decode()}
            self._write(protocol.STDOUT, protocol.RECORD + json.dumps(record).encode() + b"\n")
        elif kind == protocol.EXIT:
            self._finish()
        elif kind == protocol.REPORT:
            self._say(json.loads(payload))

    def receiver(self) -> socket.socket | None:
        """Say that nobody answers."""
        return None

    def _finish(self) -> None:
        for kind, rest in self._rest.items():
            if rest:
                self._write_lines(kind, b"\n")

    def _write_lines(self, kind: bytes, payload: bytes) -> None:
        *lines, rest = (self._rest[kind] + payload).split(b"\n")
        prefix = b"[%d] " % self._rank if self._rank else b""
        shown = b"".join(prefix + line + b"\n" for line in lines)
        # Rank 0's progress bar cannot wait for the end of its line.
        if self._rank == 0 and b"\r" in rest:
            shown, rest = shown + rest, b""
        self._rest[kind] = rest
        self._write(kind, shown)

    def _write(self, kind: bytes, data: bytes) -> None:
        stream = sys.stderr if kind == protocol.STDERR and not self._records else sys.stdout
        with contextlib.suppress(OSError):
            stream.buffer.write(data)
            stream.buffer.flush()

    def _say(self, report: dict) -> None:
        if not report["done"]:
            of_size = f" of {self._size}" if self._size else ""
            words = "\n" + report["traceback"] if report["traceback"] else report["text"] + "\n"
            said = f"hvdtrain: rank {self._rank}{of_size} failed: {words}"
            self._write(protocol.STDERR, said.encode(errors="replace"))


class Guard:
    """Watches over one rank until it has ended.

    Args:
        child: The rank's process id.
        pipes: What the rank writes.
        link: Where to send it.
        page: Where the rank notes what it does.
        quiet: Whether to show the end of its standard error only where it ends without a report of its own.
    """

    def __init__(self, child: int, pipes: Pipes, link: Link, page: mmap.mmap, quiet: bool = False) -> None:
        self._child, self._pipes, self._link = child, pipes, link
        self._quiet, self._kept, self._reported = quiet, bytearray(), False
        self._pulse = Pulse(child, page, pipes.stacks, link.send)
        self._status: int | None = None
        self._kill_at: float | None = None
        self._ordered = False
        self._crash = bytearray()
        self._selector = selectors.DefaultSelector()
        signal.pthread_sigmask(signal.SIG_BLOCK, RELAYED)
        self._listen()

    def watch(self) -> int:
        """Relay until the rank has ended.

        Returns:
            Its exit code, or minus the number of the signal that ended it.
        """
        while self._status is None:
            for key, _ in self._selector.select(timeout=0.1):
                key.data()
            self._relay_signals()
            if self._link.receiver() is not None:
                self._pulse.turn()
            if self._kill_at and time.monotonic() > self._kill_at:
                self._signal(signal.SIGKILL)
            self._reap()
        self._read_streams()
        self._read_reports()
        self._drain(self._pipes.crash, self._crash.extend)
        self._pulse.last()
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
            self._pipes.crash: lambda: self._drain(self._pipes.crash, self._crash.extend),
            self._pipes.stacks: self._read_stacks,
        }
        for pipe, reader in readers.items():
            os.set_blocking(pipe, False)
            self._selector.register(pipe, selectors.EVENT_READ, reader)
        receiver = self._link.receiver()
        if receiver is not None:
            self._selector.register(receiver, selectors.EVENT_READ, self._obey)

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
        # What was written before the report is sent before it.
        self._read_streams()
        self._drain(self._pipes.reports, self._send_reports)

    def _read_stacks(self) -> None:
        if not self._pulse.hear():
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
        # Bounded, because what a rank forked may hold the pipe and write on for ever.
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

    def _obey(self) -> None:
        receiver = self._link.receiver()
        assert receiver is not None
        try:
            orders = receiver.recv(64)
        except OSError:
            orders = b""
        for number in orders:
            self._follow(number)
        if not orders:
            self._forget(receiver)
            self._signal(signal.SIGTERM)
            # A launcher that orders the end has waited; one that is gone has not.
            wanted = 0.0 if self._ordered else self._pulse.patience
            self._kill_at = time.monotonic() + max(PATIENCE, wanted)

    def _follow(self, order: int) -> None:
        if order == protocol.LOOK:
            self._pulse.look()
        elif order == protocol.END:
            self._ordered = True
        else:
            self._signal(order)

    def _relay_signals(self) -> None:
        while (caught := signal.sigtimedwait(RELAYED, 0)) is not None:
            # An MPI launcher signals the whole process group, so the rank has its own copy of that one.
            if caught.si_pid != os.getppid():
                self._signal(caught.si_signo)

    def _signal(self, number: int) -> None:
        if self._status is None:
            os.kill(self._child, number)

    def _reap(self) -> None:
        pid, status = os.waitpid(self._child, os.WNOHANG)
        if pid:
            self._status = os.waitstatus_to_exitcode(status)


def connect() -> socket.socket | None:
    """Call the launcher that the environment names.

    Returns:
        The connection, or None where there is no launcher or none can be reached.
    """
    for address in _addresses():
        try:
            sock = socket.create_connection(address, timeout=3)
        except OSError:
            continue
        sock.settimeout(None)
        keep_alive(sock)
        return sock
    return None


def keep_alive(sock: socket.socket) -> None:
    """Let a connection to a host that was lost end within half a minute."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # With something on its way nothing is asked; then the last of these tells.
    lost = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": int(LOST * 1000)}
    for option, value in lost.items():
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _addresses() -> list[tuple[str, int]]:
    named = [entry.rpartition(":") for entry in os.environ.get(protocol.ADDRESS, "").split(",") if entry]
    addresses = [(host, int(port)) for host, _, port in named]
    srun = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    return addresses + [(srun, port) for _, port in addresses[:1] if srun]
