"""Run one job: start the MPI launcher, receive the reports of the guards, and end all processes."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, Any

from hvdtrain.heartbeat import Limits, stack_file
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.console import Console
from hvdtrain.launch.supervision.hang_detector import HangDetector
from hvdtrain.launch.supervision.protocol import Event, Server
from hvdtrain.launch.supervision.verdict import Verdict

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)

AFTER_FAILURE = 3.0  # seconds for MPI to end the job by itself
AFTER_SIGNAL = 4.0  # seconds for the ranks to end by themselves
AFTER_LAST = 10.0  # seconds for the MPI launcher to notice that all ranks have ended
KEPT = 1 << 16  # bytes kept of the MPI launcher's own output


class Interrupted(BaseException):
    """Raised when a signal asks this process to end while no ranks are running."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def hearing() -> contextlib.AbstractContextManager[None]:
    """Raise `Interrupted` for a signal inside the block; while ranks are running, the job handles signals."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    return _handling(interrupt, *ENDING, signal.SIGUSR1)


class Job:
    """One job and its result.

    Args:
        size: The number of ranks.
        console: Prints the output of the ranks.
        verbose: Whether the MPI launcher's own output is printed.
        addresses: Addresses of this host for ranks on other hosts; empty if all ranks are on this host.

    Raises:
        LaunchError: If HVDTRAIN_STALL_SECONDS or HVDTRAIN_STALL_ABORT_SECONDS is not a number of seconds.
    """

    def __init__(self, size: int, console: Console, verbose: bool, addresses: Sequence[str] = ()) -> None:
        self.verdict = Verdict(size)
        self.interrupted: int | None = None
        self._console, self._verbose = console, verbose
        self._selector = selectors.DefaultSelector()
        try:
            limits = Limits.read()
        except ValueError as error:
            raise LaunchError(str(error)) from error
        self._server = Server(self._selector, addresses)
        order = self._server.order
        self._hang_detector = HangDetector(self.verdict, order, console.say, limits, stack_file())
        self._process: subprocess.Popen[bytes] | None = None
        self._planned: list[tuple[float, Callable[[], None]]] = []
        self._signals: list[int] = []
        self._given_up = self._hung = False
        self._launcher_output = b""
        self._stdout_rest = b""
        self._relays_stdout = False

    def run(self, command: Sequence[str], environ: Mapping[str, str]) -> int:
        """Start the MPI launcher and wait until all its processes have ended.

        Returns:
            Its exit code, or minus the number of the signal that ended it.
        """

        def record(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        with _handling(record, *ENDING, *PASSED_ON):
            # In a new session, so that Ctrl-C in the terminal reaches the ranks only through this process.
            self._process = subprocess.Popen(
                command,
                env={**environ, **self._server.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                self._register(self._process.stdout, self._take_stdout)
                self._register(self._process.stderr, self._take_launcher_output)
                while not self._over():
                    self._step()
            finally:
                self._end(signal.SIGKILL)
                self._server.close()
                self._selector.close()
        return self._process.wait()

    @property
    def launcher_output(self) -> str:
        """The MPI launcher's own output."""
        return self._launcher_output.decode(errors="replace")

    def _over(self) -> bool:
        assert self._process
        ended = self._process.poll() is not None
        if ended and self._server.connected:
            self._end_in(AFTER_FAILURE)
        if self.verdict.all_gone:
            self._end_in(AFTER_LAST)
        pipes = {self._process.stdout, self._process.stderr}
        silent = not any(key.fileobj in pipes for key in self._selector.get_map().values())
        return self._given_up or (ended and silent and not self._server.connected)

    def _step(self) -> None:
        events = [event for key, _ in self._selector.select(timeout=0.1) for event in key.data()]
        # Closed connections last: a report with the cause may arrive together with the end of other ranks.
        events.sort(key=lambda event: event[1] == protocol.CLOSED)
        reported = {rank for rank, known in enumerate(self.verdict.ranks) if known.report}
        now = time.monotonic()
        for rank, kind, payload in events:
            # Reports of ranks that are ended because of a hang do not contain its cause.
            if not (self._hung and kind == protocol.REPORT):
                self.verdict.note(rank, kind, payload, now)
        for rank, kind, payload in events:
            # Output of a rank before its report may explain the failure, for example a usage message of argparse.
            if kind == protocol.REPORT:
                reported.add(rank)
            self._show(rank, kind, payload, rank in reported)
        self._console.tick()
        if self.verdict.first is None and not self._planned:
            self._hung = self._hang_detector.check(now)
        if self.verdict.resumable is not None:
            self._end_patiently()
        elif self.verdict.first is not None:
            self._end_in(AFTER_FAILURE)
        self._handle_signals()
        while self._planned and time.monotonic() >= self._planned[0][0]:
            self._planned.pop(0)[1]()

    def _show(self, rank: int, kind: bytes, payload: bytes, reported: bool) -> None:
        """Print output, but not the standard error of ranks that are ended because of the first failure."""
        if kind not in (protocol.STDOUT, protocol.STDERR):
            return
        first = self.verdict.first
        torn_down = first is not None and (reported or rank != first)
        if self._verbose or kind == protocol.STDOUT or not (torn_down or self.interrupted):
            self._console.write(rank, kind, payload)

    def _end_in(self, seconds: float) -> None:
        """Plan the end of the job: SIGTERM, SIGKILL, give up. A plan that exists already is kept."""

        def give_up() -> None:
            self._given_up = True

        if not self._planned and not self._given_up:
            now = time.monotonic()
            self._planned = [
                (now + seconds, lambda: self._end(signal.SIGTERM)),
                (now + seconds + 3, lambda: self._end(signal.SIGKILL)),
                (now + seconds + 4, give_up),
            ]

    def _end_patiently(self) -> None:
        """Plan the end of the job after the longest time that a rank has requested; a later request counts too."""
        begun = time.monotonic()

        def check() -> None:
            failed = self.verdict.first is not None and self.verdict.resumable is None
            asked = [rank.beat.patience for rank in self.verdict.ranks if not failed]
            end, now = begun + max([AFTER_SIGNAL, *asked]), time.monotonic()
            self._planned = [(min(end, now + 0.5), check)]
            if self.verdict.all_gone or now >= end:
                self._planned = []
                self._end_in(AFTER_LAST if self.verdict.all_gone else 0)

        if not self._planned and not self._given_up:
            check()

    def _end(self, number: int) -> None:
        """Order the guards to end their ranks, and send a signal to the MPI launcher."""
        self._server.end()
        if self._process and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number in ENDING and self.interrupted:
                self._planned = []
                self._end_in(0)
            elif number in ENDING:
                self.interrupted = number
                self._end_patiently() if self._server.connected else self._end_in(0)
            self._server.order(number)

    def _register(self, pipe: IO[bytes] | None, take: Callable[[bytes], list[Event]]) -> None:
        assert pipe is not None

        def read() -> list[Event]:
            data = os.read(pipe.fileno(), KEPT)
            if not data:
                self._selector.unregister(pipe)
            return take(data)

        self._selector.register(pipe, selectors.EVENT_READ, read)

    def _take_launcher_output(self, data: bytes) -> list[Event]:
        self._launcher_output = (self._launcher_output + data)[-KEPT:]
        if self._verbose and data:
            self._console.write(0, protocol.STDERR, data)
        return []

    def _take_stdout(self, data: bytes) -> list[Event]:
        """Separate the MPI launcher's own output from lines and records of guards without a connection."""
        *lines, self._stdout_rest = (self._stdout_rest + (data or b"\n")).split(b"\n")
        events = []
        for line in lines:
            if line.startswith(protocol.RECORD):
                # A guard's HELLO record comes before its first line.
                self._relays_stdout = True
                events.extend(_read_record(line.removeprefix(protocol.RECORD)))
            elif self._relays_stdout and (line or data):
                self._console.write(0, protocol.STDOUT, line + b"\n")
            else:
                self._take_launcher_output(line + b"\n" if line else b"")
        return events


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Let a function handle these signals inside the block.

    If nohup has set SIGHUP to be ignored, it stays ignored: the job outlives its terminal.
    """
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    handled = [number for number in numbers if number != signal.SIGHUP or not ignored]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def _read_record(line: bytes) -> list[Event]:
    try:
        record: dict[str, Any] = json.loads(line)
        return [(int(record["rank"]), record["kind"].encode(), record["payload"].encode())]
    except (ValueError, KeyError, TypeError):
        return []
