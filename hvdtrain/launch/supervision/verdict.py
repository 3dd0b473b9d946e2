"""Record what the guards report about the ranks, determine which rank failed first, and describe its failure."""

import json
import re
import signal
from dataclasses import dataclass, field

from hvdtrain.heartbeat import Beat
from hvdtrain.launch.supervision import protocol
from hvdtrain.stop_request import RESUMABLE

HINTS: dict[int, str] = {
    signal.SIGKILL: "The kernel does this when memory runs out (check `dmesg | tail`); a smaller "
    "batch or fewer ranks on a host need less.",
    signal.SIGSEGV: "Native code has accessed invalid memory.",
    signal.SIGBUS: "Shared memory may be full: check `df /dev/shm`.",
    signal.SIGTERM: "Another process has asked it to end.",
}

# The signals with which an MPI launcher ends the ranks of a failing job.
_TEARING_DOWN = (-signal.SIGTERM, -signal.SIGKILL)


@dataclass
class RankState:
    """The known facts about one rank, with times in seconds on the launcher's monotonic clock."""

    host: str = "unknown"
    up: bool = False  # whether it has started
    done: bool = False  # whether its script has finished
    gone: bool = False  # whether it has ended, or its guard is lost
    status: int | None = None  # its exit code, or minus the number of the signal that ended it
    report: dict = field(default_factory=dict)  # the content of its REPORT frame
    crash: str = ""  # its Python stack when a signal killed it
    # Its last position; the process id is 0 if it has not reported any.
    beat: Beat = field(default_factory=lambda: Beat(busy=False))
    since: float | None = None  # when its wait began; None if it does not wait
    alive: float = 0.0  # when it last made progress
    # The answer of its guard to the last request for stacks, the content of a STACK frame.
    answer: dict = field(default_factory=dict)
    unheard: bool = False  # whether its guard has sent nothing since that request
    silent: bool = False  # whether its guard did not answer while others did, and has sent nothing since

    @property
    def vanished(self) -> bool:
        """Whether it ended without a report and without an exit status."""
        return self.gone and self.status is None and not self.report

    @property
    def succeeded(self) -> bool:
        """Whether the script has finished and the process has ended with exit code 0 after it."""
        return self.done and self.status == 0

    @property
    def failed(self) -> bool:
        """Whether it has reported a failure itself."""
        return bool(self.report) and not self.done

    def set_beat(self, beat: Beat, now: float) -> None:
        """Record a new position."""
        self.unheard = self.silent = False
        if beat.busy or self.beat.busy:
            self.alive = now
        self.beat = beat
        self.since = None if beat.waiting is None else now - beat.waiting


class Verdict:
    """The result of a job, from the reports of the guards."""

    def __init__(self, size: int) -> None:
        self.ranks = [RankState() for _ in range(size)]
        self.first: int | None = None

    def note(self, number: int, kind: bytes, payload: bytes, now: float = 0.0) -> None:
        """Record a frame, or the end of a connection; the first failure counts as the cause of all others."""
        if not 0 <= number < len(self.ranks):
            return
        rank = self.ranks[number]
        content = {} if kind in (protocol.STDOUT, protocol.STDERR, protocol.CLOSED) else json.loads(payload)
        if kind == protocol.CLOSED:
            self._blame(number, not rank.gone, informative=False)
            rank.gone = True
        elif kind == protocol.HELLO:
            rank.up, rank.host = True, content["host"]
        elif kind == protocol.REPORT:
            rank.report, rank.done = content, content["done"]
            self._blame(number, not rank.done)
        elif kind == protocol.EXIT:
            rank.status, rank.crash, rank.gone = content["status"], content["crash"], True
            self._blame(number, not rank.succeeded, informative=rank.status not in _TEARING_DOWN)
        elif kind == protocol.BEAT:
            rank.set_beat(Beat(**content), now)
        elif kind == protocol.STACK:
            rank.answer = content
            rank.set_beat(Beat(**content["beat"]), now)

    @property
    def succeeded(self) -> bool:
        """Whether every rank has succeeded."""
        return all(rank.succeeded for rank in self.ranks)

    @property
    def all_gone(self) -> bool:
        """Whether every rank has ended, with or without success."""
        return all(rank.gone for rank in self.ranks)

    @property
    def explained(self) -> bool:
        """Whether the first failure has a known reason: a report, or a signal that no launcher sends."""
        rank = self.ranks[self.first or 0]
        return bool(rank.report) or ((rank.status or 0) < 0 and rank.status != -signal.SIGTERM)

    @property
    def resumable(self) -> str | None:
        """The message of the first rank that stopped in order to be resumed later; None if a rank failed before."""
        report = self.ranks[self.first].report if self.first is not None else {}
        if report.get("code") != RESUMABLE:
            return None
        if report.get("resumable"):
            return report["text"]
        return (
            f"rank {self.first} called sys.exit({RESUMABLE}), which says that the same command goes on later"
        )

    @property
    def missing(self) -> list[int]:
        """The ranks that have never started."""
        return [number for number, rank in enumerate(self.ranks) if not rank.up]

    def code(self) -> int:
        """Return the exit code of the rank that failed first, as a shell reports it."""
        if self.first is None:
            return 0 if self.succeeded else 1
        rank = self.ranks[self.first]
        if rank.failed:
            return int(rank.report["code"])
        if rank.status is None or rank.status == 0:
            return 1
        return rank.status if rank.status > 0 else 128 - rank.status

    def sentence(self) -> str:
        """Return a message about the rank that failed first; it ends with the traceback, if there is one."""
        assert self.first is not None
        rank = self.ranks[self.first]
        name = f"hvdtrain: rank {self.first} of {len(self.ranks)} (host {rank.host})"
        return self._same_failures() + name + _ending(rank)

    def summary(self) -> str:
        """Return a summary of the first failure in a few words."""
        assert self.first is not None
        rank = self.ranks[self.first]
        if rank.failed:
            return f"failed: {rank.report['text']}"
        return re.split(r"[.:,] |[.:]$", _ending(rank).strip(), maxsplit=1)[0]

    def _blame(self, number: int, failed: bool, informative: bool = True) -> None:
        """Record the first failure; a lost connection is replaced by a later failure that has a reason."""
        if failed and (self.first is None or (informative and self.ranks[self.first].vanished)):
            self.first = number

    def _same_failures(self) -> str:
        """Return a line about the other ranks that failed with the same message; may be empty."""
        assert self.first is not None
        message = self.ranks[self.first].report.get("text")
        others = [
            str(number)
            for number, rank in enumerate(self.ranks)
            if number != self.first and rank.failed and rank.report["text"] == message
        ]
        if not message or not others:
            return ""
        *most, last = others
        named = f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"
        return f"hvdtrain: {named} failed with the same message.\n"


def _ending(rank: RankState) -> str:
    """Describe how a rank ended; the text continues a sentence after its name."""
    if rank.failed:
        trace = rank.report["traceback"].rstrip()
        return f" failed; its traceback:\n\n{trace}" if trace else f" ended the job: {rank.report['text']}"
    if rank.status is None:
        return (
            " vanished: its connection ended without a message, so its host or its guard process may be lost."
        )
    when = " after its script had finished, while Python was shutting down" if rank.done else ""
    if rank.status < 0:
        return _killed(-rank.status, when, rank.crash)
    if rank.status == 0:
        return (
            " ended with exit code 0 before its script had finished (os._exit(0), or exit(0) in a library), so "
            "nothing proves that it did its work."
        )
    how = "without a Python exception (os._exit, or exit() in a library)"
    return f" ended with exit code {rank.status}{when}, {how}."


def _killed(number: int, when: str, crash: str) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown"
    sentence = f" was killed by signal {number} ({name}){when}."
    # Only the part of faulthandler's output that belongs to the user's code.
    stack = re.split(r"^.*hvdtrain/script\.py|^Extension modules", crash, maxsplit=1, flags=re.M)[0].strip()
    if stack:
        return f"{sentence} Its Python stack at that moment:\n\n{stack}"
    return f"{sentence} {HINTS.get(number, '')}".rstrip()
