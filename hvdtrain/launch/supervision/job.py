"""One job from its start to its last process: the MPI launcher, the guards, and the patience with both."""

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

from hvdtrain.heartbeat import Beat
from hvdtrain.launch.hangs.hang_detector import Stall
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.console import Console
from hvdtrain.launch.supervision.guard_server import CLOSED, Event, Server
from hvdtrain.launch.supervision.verdict import Verdict
from hvdtrain.timeouts import Limits, stack_file

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)

AFTER_FAILURE = 3.0  # seconds for MPI to end the job by itself
AFTER_SIGNAL = 4.0  # seconds for the ranks to end by themselves
AFTER_LAST = 10.0  # seconds for the MPI launcher to notice that all ranks have ended
KEPT = 1 << 16  # bytes of the MPI launcher's own words that are remembered


class Job:
    """Runs one job and gathers what became of it.

    Args:
        size: How many ranks it has.
        console: Where the ranks' output goes.
        verbose: Whether the MPI launcher's own words are shown.
        addresses: Names of this host for ranks on other hosts; empty when all are here.

    Raises:
        LaunchError: If HVDTRAIN_STALL_SECONDS or HVDTRAIN_STALL_ABORT_SECONDS is no number of seconds.
    """

    def __init__(self, size: int, console: Console, verbose: bool, addresses: Sequence[str] = ()) -> None:
        self.verdict = Verdict(size)
        self.interrupted: int | None = None
        self._console, self._verbose = console, verbose
        self._selector = selectors.DefaultSelector()
        self._stall = Stall(self.verdict, self._order, console.say, _limits(), stack_file())
        self._server = Server(self._selector, addresses)
        self._process: subprocess.Popen[bytes] | None = None
        self._agenda: list[tuple[float, Callable[[], None]]] = []
        self._signals: list[int] = []
        self._given_up = self._hung = False
        self._said = b""
        self._stdout_rest = b""
        self._relays_stdout = False

    def run(self, command: Sequence[str], environ: Mapping[str, str]) -> int:
        """Start the command and stays with it until nothing of it is left.

        Args:
            command: The MPI launcher with its options and the command of a rank.
            environ: Its environment, to which the server's address is added.

        Returns:
            The MPI launcher's own exit code, minus the number of the signal where one ended it.
        """
        with self._hearing_signals():
            # In a session of its own, so that Ctrl-C in the terminal reaches the ranks only through here.
            self._process = subprocess.Popen(
                command,
                env={**environ, **self._server.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                self._listen_to(self._process.stdout, self._hear_stdout)
                self._listen_to(self._process.stderr, self._hear_chatter)
                while not self._over():
                    self._turn()
            finally:
                self._kill()
                self._server.close()
                self._selector.close()
        return self._process.wait()

    @property
    def beats(self) -> dict[int, Beat]:
        """Where each rank was last heard of."""
        return self._stall.beats

    @property
    def said(self) -> str:
        """The MPI launcher's own words."""
        return self._said.decode(errors="replace")

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

    def _turn(self) -> None:
        events = [event for key, _ in self._selector.select(timeout=0.1) for event in key.data()]
        # The cause first: the end of other ranks, and what they say about it, may come in the same turn.
        events.sort(key=lambda event: event[1] == CLOSED)
        reported = {rank for rank, known in enumerate(self.verdict.ranks) if known.report}
        now = time.monotonic()
        for rank, kind, payload in events:
            # What a rank says that is ended because it hung explains nothing.
            if not (self._hung and kind == protocol.REPORT):
                self.verdict.note(rank, kind, payload)
            self._stall.hear(rank, kind, payload, now)
        for rank, kind, payload in events:
            # What a rank said before it ended is its own explanation: argparse's, say.
            if kind == protocol.REPORT:
                reported.add(rank)
            self._show(rank, kind, payload, rank in reported)
        self._console.tick()
        self._end_hang(now)
        if self.verdict.resumable is not None:
            self._end_patiently()
        elif self.verdict.first is not None:
            self._end_in(AFTER_FAILURE)
        self._answer_signals()
        while self._agenda and time.monotonic() >= self._agenda[0][0]:
            self._agenda.pop(0)[1]()

    def _end_hang(self, now: float) -> None:
        """End the job in the name of the rank that the others wait for, where that has become hopeless."""
        blame = self._stall.turn(now) if self.verdict.first is None and not self._agenda else None
        if blame is not None:
            self._hung = True
            self.verdict.note(blame.rank, protocol.REPORT, blame.report)

    def _order(self, number: int) -> None:
        self._server.order(number)

    def _show(self, rank: int, kind: bytes, payload: bytes, reported: bool) -> None:
        """Show output, but not what dying ranks say on standard error after the first failure."""
        if kind not in (protocol.STDOUT, protocol.STDERR):
            return
        first = self.verdict.first
        torn_down = first is not None and (reported or rank != first)
        if self._verbose or kind == protocol.STDOUT or not (torn_down or self.interrupted):
            self._console.write(rank, kind, payload)

    def _end_in(self, seconds: float) -> None:
        """Plan the end: ask, insist, leave. The first plan stands."""
        if not self._agenda and not self._given_up:
            now = time.monotonic()
            self._agenda = [
                (now + seconds, self._terminate),
                (now + seconds + 3, self._kill),
                (now + seconds + 4, self._give_up),
            ]

    def _end_patiently(self) -> None:
        """Plan the end for when the ranks have had the time to end by themselves that they ask for, even late."""
        begun = time.monotonic()

        def look() -> None:
            failed = self.verdict.first is not None and self.verdict.resumable is None
            asked = [beat.patience for beat in self.beats.values() if not failed]
            end, now = begun + max([AFTER_SIGNAL, *asked]), time.monotonic()
            self._agenda = [(min(end, now + 0.5), look)]
            if self.verdict.all_gone or now >= end:
                self._agenda = []
                self._end_in(AFTER_LAST if self.verdict.all_gone else 0)

        if not self._agenda and not self._given_up:
            look()

    def _terminate(self) -> None:
        self._server.end()
        self._signal_launcher(signal.SIGTERM)

    def _kill(self) -> None:
        self._server.end()
        self._signal_launcher(signal.SIGKILL)

    def _give_up(self) -> None:
        self._given_up = True

    def _signal_launcher(self, number: int) -> None:
        if self._process and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _answer_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number in ENDING and self.interrupted:
                self._agenda = []
                self._end_in(0)
            elif number in ENDING:
                self.interrupted = number
                self._end_patiently() if self._server.connected else self._end_in(0)
            self._order(number)

    @contextlib.contextmanager
    def _hearing_signals(self) -> Iterator[None]:
        def hear(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        before = {number: signal.signal(number, hear) for number in heard(*ENDING, *PASSED_ON)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen_to(self, pipe: IO[bytes] | None, take: Callable[[bytes], list[Event]]) -> None:
        assert pipe is not None

        def hear() -> list[Event]:
            data = os.read(pipe.fileno(), KEPT)
            if not data:
                self._selector.unregister(pipe)
            return take(data)

        self._selector.register(pipe, selectors.EVENT_READ, hear)

    def _hear_chatter(self, data: bytes) -> list[Event]:
        self._said = (self._said + data)[-KEPT:]
        if self._verbose and data:
            self._console.write(0, protocol.STDERR, data)
        return []

    def _hear_stdout(self, data: bytes) -> list[Event]:
        """Return the MPI launcher's chatter from the lines and records of guards that could not call."""
        *lines, self._stdout_rest = (self._stdout_rest + (data or b"\n")).split(b"\n")
        events = []
        for line in lines:
            if line.startswith(protocol.RECORD):
                # A guard's hello comes before its first line.
                self._relays_stdout = True
                events.extend(_read_record(line.removeprefix(protocol.RECORD)))
            elif self._relays_stdout and (line or data):
                self._console.write(0, protocol.STDOUT, line + b"\n")
            else:
                self._hear_chatter(line + b"\n" if line else b"")
        return events


def heard(*numbers: int) -> list[int]:
    """Leaves out a hang-up that nohup has asked to ignore, so that a job outlives its terminal."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in numbers if number != signal.SIGHUP or not ignored]


def _limits() -> Limits:
    try:
        return Limits.read()
    except ValueError as error:
        raise LaunchError(str(error)) from error


def _read_record(line: bytes) -> list[Event]:
    try:
        record: dict[str, Any] = json.loads(line)
        return [(int(record["rank"]), record["kind"].encode(), record["payload"].encode())]
    except (ValueError, KeyError, TypeError):
        return []
