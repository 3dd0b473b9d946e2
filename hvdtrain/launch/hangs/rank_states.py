"""Collect the reports of the guards about their ranks, and determine which ranks wait for which."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from hvdtrain.heartbeat import Beat
from hvdtrain.launch.hangs import stacks
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.verdict import Verdict

# The kernel's letters for a process that is stopped by a signal, and for one stopped by a debugger.
STOPPED = ("T", "t")


@dataclass(frozen=True)
class Answer:
    """A guard's answer to a request for details.

    Args:
        stacks: The stacks of all threads of its rank; empty if the rank could not write them.
        waits_in: The kernel function in which the rank sleeps; empty if unknown.
        waits: The number of waits of the rank at that time.
    """

    stacks: str = ""
    waits_in: str = ""
    waits: int = 0


@dataclass
class RankState:
    """The state of one rank, with times in seconds on the launcher's monotonic clock.

    Args:
        beat: The last report about it.
        since: When its wait began; None if it does not wait.
        alive: When it last made progress.
    """

    beat: Beat
    since: float | None = None
    alive: float = 0.0


@final
class RankStates:
    """The states of all ranks, from the reports of their guards.

    Args:
        verdict: The hosts and results of the ranks.
        grace: For how many seconds a rank still counts as working after its last progress.
    """

    def __init__(self, verdict: Verdict, grace: float) -> None:
        self.verdict = verdict
        self.ranks: dict[int, RankState] = {}
        self.answers: dict[int, Answer] = {}
        self._unanswered: set[int] = set()  # ranks without a report since the last request
        self._silent: set[int] = set()
        self._grace = grace

    def receive(self, number: int, kind: bytes, payload: bytes, now: float) -> None:
        """Record the content of a guard's frame."""
        if kind == protocol.BEAT:
            self._update(number, Beat(**json.loads(payload)), now)
        elif kind == protocol.STACK:
            answer = json.loads(payload)
            self._update(number, Beat(**answer["beat"]), now)
            self.answers[number] = Answer(answer["stacks"], answer["waits_in"], answer["beat"]["waits"])

    def waiting(self, now: float) -> dict[int, float]:
        """Return for how many seconds each waiting rank has waited, without ranks that are excused."""
        return {
            number: now - rank.since
            for number, rank in sorted(self.ranks.items())
            if rank.since is not None and not self._excused(number, rank.beat)
        }

    def late(self, waiting: Mapping[int, float]) -> list[int]:
        """Return the ranks that the waiting ranks wait for."""
        size = len(self.verdict.ranks)
        awaited: set[int] = set()
        for number in waiting:
            awaited |= _members(self.ranks[number].beat.among, size)
        return sorted(awaited - set(waiting))

    def works(self, number: int, now: float) -> bool:
        """Return whether a rank computes, reads or writes."""
        rank = self.ranks.get(number)
        if rank is None or self.gone(number) or rank.beat.state in STOPPED or self.silent(number):
            return False
        return rank.beat.busy or now - rank.alive < self._grace

    def last_sign(self, number: int, now: float) -> float:
        """Return when a rank last made progress."""
        rank = self.ranks.get(number)
        if rank is None:
            return 0.0
        return now if rank.beat.busy and self.works(number, now) else rank.alive

    def still_waits(self, number: int, waits: int) -> bool:
        """Return whether a rank is still in its wait with this number."""
        beat = self.ranks[number].beat
        return beat.waiting is not None and beat.waits == waits

    def ask(self) -> None:
        """Discard earlier answers, because the guards are asked again."""
        self.answers, self._unanswered = {}, set(self.ranks)

    def close(self) -> None:
        """End the time for answers: if any guard has answered, ranks without a report count as silent."""
        self._silent = set(self._unanswered) if self.answers else set()

    def all_answered(self) -> bool:
        """Return whether the guards of all running ranks have answered."""
        return {number for number in self.ranks if not self.gone(number)} <= set(self.answers)

    def silent(self, number: int) -> bool:
        """Return whether a rank's guard did not answer while others did, and has sent nothing since."""
        return number in self._silent

    def gone(self, number: int) -> bool:
        """Return whether a rank has ended."""
        return self.verdict.ranks[number].gone

    def first_step(self) -> bool:
        """Return whether no rank has passed its first step, in which compilation may take long."""
        return all((rank.beat.step or 0) <= 1 for rank in self.ranks.values())

    def _update(self, number: int, beat: Beat, now: float) -> None:
        self._unanswered.discard(number)
        self._silent.discard(number)
        rank = self.ranks.setdefault(number, RankState(beat))
        if beat.busy or rank.beat.busy:
            rank.alive = now
        rank.beat = beat
        rank.since = None if beat.waiting is None else now - beat.waiting

    def _excused(self, number: int, beat: Beat) -> bool:
        """Return whether a rank that has recorded a wait is not really waiting.

        A stopped rank does not wait. In Horovod's core the wait may be over without a record; then the process is
        busy, or its main thread is outside of TensorFlow.
        """
        if self.gone(number) or self.silent(number) or beat.state in STOPPED or (beat.loose and beat.busy):
            return True
        answer = self.answers.get(number)
        if not beat.loose or answer is None or answer.waits != beat.waits:
            return False
        return "/tensorflow/" not in stacks.innermost_file(answer.stacks)


def _members(among: str, size: int) -> set[int]:
    """Return the ranks of a process set from its description; all ranks if it is empty."""
    members: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", among):
        members.update(range(int(first), int(last or first) + 1))
    return members & set(range(size)) or set(range(size))
