"""What became of each rank, which failed first, and how to say so in a sentence."""

import json
import re
import signal
from dataclasses import dataclass, field

from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.guard_server import CLOSED
from hvdtrain.stop_request import RESUMABLE

HINTS: dict[int, str] = {
    signal.SIGKILL: "The kernel does this when memory runs out (`dmesg | tail` would say so); a smaller "
    "batch or fewer ranks on a host need less.",
    signal.SIGSEGV: "Native code read or wrote where it must not.",
    signal.SIGBUS: "Shared memory may be full: `df /dev/shm` tells.",
    signal.SIGTERM: "Something outside asked it to end.",
}

# How the ranks of a failing job are ended by their MPI launcher.
_TEARING_DOWN = (-signal.SIGTERM, -signal.SIGKILL)


@dataclass
class Rank:
    """What is known of one rank."""

    host: str = "unknown"
    up: bool = False
    done: bool = False
    gone: bool = False
    status: int | None = None
    report: dict = field(default_factory=dict)
    crash: str = ""

    @property
    def vanished(self) -> bool:
        """Whether it ended without a word."""
        return self.gone and self.status is None and not self.report

    @property
    def succeeded(self) -> bool:
        """Whether the script came to its end and the process ended well after it."""
        return self.done and self.status == 0


class Verdict:
    """Gathers what the guards tell, and judges the job by it.

    Args:
        size: How many ranks were to be started.
    """

    def __init__(self, size: int) -> None:
        self.ranks = [Rank() for _ in range(size)]
        self.first: int | None = None

    def note(self, rank: int, kind: bytes, payload: bytes) -> None:
        """Take one event; the first failure among them is remembered as the cause of all others."""
        if not 0 <= rank < len(self.ranks):
            return
        one = self.ranks[rank]
        if kind == protocol.HELLO:
            one.up, one.host = True, json.loads(payload)["host"]
        elif kind == protocol.REPORT:
            one.report = json.loads(payload)
            one.done = one.report["done"]
            self._blame(rank, not one.done)
        elif kind == protocol.EXIT:
            ending = json.loads(payload)
            one.status, one.crash, one.gone = ending["status"], ending["crash"], True
            self._blame(rank, not one.succeeded, telling=one.status not in _TEARING_DOWN)
        elif kind == CLOSED:
            self._blame(rank, not one.gone, telling=False)
            one.gone = True

    @property
    def succeeded(self) -> bool:
        """Whether every rank is known to have come to its end."""
        return all(rank.succeeded for rank in self.ranks)

    @property
    def all_gone(self) -> bool:
        """Whether every rank has ended, one way or another."""
        return all(rank.gone for rank in self.ranks)

    @property
    def explained(self) -> bool:
        """Whether the first failure speaks for itself: a report, or a signal that no launcher sends."""
        rank = self.ranks[self.first or 0]
        return bool(rank.report) or ((rank.status or 0) < 0 and rank.status != -signal.SIGTERM)

    @property
    def resumable(self) -> str | None:
        """What the rank said that stopped first in order to go on later; None where something failed before."""
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
        """The ranks that were never heard of."""
        return [number for number, rank in enumerate(self.ranks) if not rank.up]

    def code(self) -> int:
        """Return the exit code of the rank that failed first, as a shell writes it."""
        if self.first is None:
            return 0 if self.succeeded else 1
        rank = self.ranks[self.first]
        if rank.report and not rank.done:
            return int(rank.report["code"])
        if rank.status is None or rank.status == 0:
            return 1
        return rank.status if rank.status > 0 else 128 - rank.status

    def sentence(self) -> str:
        """Return which rank failed first and how, ending in its traceback where there is one."""
        assert self.first is not None
        rank = self.ranks[self.first]
        name = f"hvdtrain: rank {self.first} of {len(self.ranks)} (host {rank.host})"
        return self._chorus() + name + _ending(rank)

    def summary(self) -> str:
        """Say in a few words how that rank ended."""
        assert self.first is not None
        rank = self.ranks[self.first]
        if rank.report and not rank.done:
            return f"failed: {rank.report['text']}"
        return re.split(r"[.:,] |[.:]$", _ending(rank).strip(), maxsplit=1)[0]

    def _blame(self, rank: int, failed: bool, telling: bool = True) -> None:
        """Record the first failure; one that tells nothing makes way for a later one that does."""
        if failed and (self.first is None or (telling and self.ranks[self.first].vanished)):
            self.first = rank

    def _chorus(self) -> str:
        """Return the other ranks that failed with the same words."""
        assert self.first is not None
        words = self.ranks[self.first].report.get("text")
        others = [
            str(number)
            for number, rank in enumerate(self.ranks)
            if number != self.first and rank.report and not rank.done and rank.report["text"] == words
        ]
        if not words or not others:
            return ""
        *most, last = others
        named = f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"
        return f"hvdtrain: {named} failed with the same words.\n"


def _ending(rank: Rank) -> str:
    report = rank.report
    if report and not rank.done:
        trace = report["traceback"].rstrip()
        return f" failed; its traceback:\n\n{trace}" if trace else f" ended the job: {report['text']}"
    if rank.status is None:
        return " vanished: its connection ended without a word, so its host or its guard may be gone."
    when = " after its script had come to its end, while Python was shutting down" if rank.done else ""
    if rank.status < 0:
        return _killed(-rank.status, when, rank.crash)
    if rank.status == 0:
        return (
            " ended with exit code 0 before its script had come to its end (os._exit(0), or exit(0) in a "
            "library), so nothing proves that it did its work."
        )
    how = "without a Python exception (os._exit, or exit() in a library)"
    return f" ended with exit code {rank.status}{when}, {how}."


def _killed(number: int, when: str, crash: str) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown"
    sentence = f" was killed by signal {number} ({name}){when}."
    stack = _stack(crash)
    if stack:
        return f"{sentence} Its Python stack at that moment:\n\n{stack}"
    return f"{sentence} {HINTS.get(number, '')}".rstrip()


def _stack(crash: str) -> str:
    """Cut faulthandler's text down to the user's part."""
    kept = []
    for line in crash.splitlines():
        if "hvdtrain/script.py" in line or line.startswith("Extension modules"):
            break
        kept.append(line)
    return "\n".join(kept).strip()
