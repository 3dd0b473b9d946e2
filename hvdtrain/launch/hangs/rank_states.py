"""Who is where: what the guards have told of their ranks, and which of these wait for which."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from hvdtrain.heartbeat import Beat
from hvdtrain.launch.hangs import stacks
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.verdict import Verdict

# The kernel's letters for a process that is stopped, and for one that a debugger holds.
STOPPED = ("T", "t")


@dataclass(frozen=True)
class Answer:
    """What a guard has told on request.

    Args:
        stacks: The stacks of all threads of its rank; empty if that could not write them.
        waits_in: Where in the kernel it sleeps, if that is known.
        waits: How many waits it had had then.
    """

    stacks: str = ""
    waits_in: str = ""
    waits: int = 0


@dataclass
class Rank:
    """One rank, with times on the launcher's clock.

    Args:
        beat: What was last told of it.
        since: When it began to wait; None when it does not.
        alive: When it was last seen to do anything.
    """

    beat: Beat
    since: float | None = None
    alive: float = 0.0


@final
class Standing:
    """Gathers what the guards tell.

    Args:
        verdict: What is known of the ranks' hosts and ends.
        doubt: For how many seconds a rank that has just been at work counts as one that is.
    """

    def __init__(self, verdict: Verdict, doubt: float) -> None:
        self.verdict = verdict
        self.ranks: dict[int, Rank] = {}
        self.answers: dict[int, Answer] = {}
        self._unheard: set[int] = set()  # since all were asked
        self._silent: set[int] = set()
        self._doubt = doubt

    def hear(self, number: int, kind: bytes, payload: bytes, now: float) -> None:
        """Take a guard's frame."""
        if kind == protocol.BEAT:
            self._note(number, Beat(**json.loads(payload)), now)
        elif kind == protocol.STACK:
            told = json.loads(payload)
            self._note(number, Beat(**told["beat"]), now)
            self.answers[number] = Answer(told["stacks"], told["waits_in"], told["beat"]["waits"])

    def waiting(self, now: float) -> dict[int, float]:
        """Return for how many seconds each rank has waited that waits for others and could itself go on."""
        return {
            number: now - rank.since
            for number, rank in sorted(self.ranks.items())
            if rank.since is not None and not self._excused(number, rank.beat)
        }

    def late(self, waiting: Mapping[int, float]) -> list[int]:
        """Return the ranks for which those wait."""
        size = len(self.verdict.ranks)
        awaited = {each for number in waiting for each in _members(self.ranks[number].beat.among, size)}
        return sorted(awaited - set(waiting))

    def works(self, number: int, now: float) -> bool:
        """Return whether a rank computes, reads or writes."""
        rank = self.ranks.get(number)
        if rank is None or self.gone(number) or rank.beat.state in STOPPED or self.silent(number):
            return False
        return rank.beat.busy or now - rank.alive < self._doubt

    def last_sign(self, number: int, now: float) -> float:
        """Return when a rank was last seen to do anything."""
        rank = self.ranks.get(number)
        if rank is None:
            return 0.0
        return now if rank.beat.busy and self.works(number, now) else rank.alive

    def still_waits(self, number: int, waits: int) -> bool:
        """Return whether a rank is in the same wait as it was."""
        beat = self.ranks[number].beat
        return beat.waiting is not None and beat.waits == waits

    def ask(self) -> None:
        """Forget what was answered before."""
        self.answers, self._unheard = {}, set(self.ranks)

    def close(self) -> None:
        """End the time for answers: of whom nothing was heard, but of others, is silent."""
        self._silent = set(self._unheard) if self.answers else set()

    def all_answered(self) -> bool:
        """Return whether nothing more is to be expected."""
        return {number for number in self.ranks if not self.gone(number)} <= set(self.answers)

    def silent(self, number: int) -> bool:
        """Return whether a rank's guard did not answer when others did, nor since."""
        return number in self._silent

    def gone(self, number: int) -> bool:
        """Return whether a rank has ended."""
        return self.verdict.ranks[number].gone

    def first_step(self) -> bool:
        """Return whether no rank is known to have come beyond its first step, which may take long to compile."""
        return all((rank.beat.step or 0) <= 1 for rank in self.ranks.values())

    def _note(self, number: int, beat: Beat, now: float) -> None:
        self._unheard.discard(number)
        self._silent.discard(number)
        rank = self.ranks.setdefault(number, Rank(beat))
        if beat.busy or rank.beat.busy:
            rank.alive = now
        rank.beat = beat
        rank.since = None if beat.waiting is None else now - beat.waiting

    def _excused(self, number: int, beat: Beat) -> bool:
        """A stopped rank does not wait; and whether Horovod's core still works only the process itself shows."""
        if self.gone(number) or self.silent(number) or beat.state in STOPPED or (beat.loose and beat.busy):
            return True
        answer = self.answers.get(number)
        known = beat.loose and answer is not None and answer.waits == beat.waits
        return known and "/tensorflow/" not in stacks.innermost(answer.stacks if answer else "")


def _members(among: str, size: int) -> set[int]:
    """Read the ranks of a process set from its words; all ranks where there are none."""
    runs = re.findall(r"(\d+)(?:-(\d+))?", among)
    return {each for a, b in runs for each in range(int(a), int(b or a) + 1) if each < size} or set(
        range(size)
    )
