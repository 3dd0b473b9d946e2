"""No silent hang: says who waits for whom, and ends the job when there is no more hope."""

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from hvdtrain.heartbeat import Beat
from hvdtrain.launch.hangs.hang_messages import all_stacks, sentence
from hvdtrain.launch.hangs.rank_states import Standing
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.verdict import Verdict
from hvdtrain.timeouts import Limits

# As timeout(1) ends what took too long.
CODE = 124
_ANSWERS = 5.0  # seconds for the guards to tell what they know
# How many times as long others may wait for a rank that is at work: before anything is said in the first step,
# which may be a long compilation; and before the job is ended.
_COMPILING = 5
_WORKING = 6


class Hope(enum.IntEnum):
    """How bad it is."""

    WELL = 0
    SLOW = 1  # ranks wait for one that is at work
    STUCK = 2  # ranks wait, and those that they wait for do nothing
    NONE = 3  # and have done nothing for longer than the second limit


@dataclass(frozen=True)
class Blame:
    """The rank in whose name the job ends, and why.

    Args:
        rank: Which.
        text: Continues a sentence about it.
    """

    rank: int
    text: str

    @property
    def report(self) -> bytes:
        """The same as if the rank had reported it."""
        return json.dumps({"done": False, "code": CODE, "text": self.text, "traceback": ""}).encode()


@final
class Stall:
    """Judges by what the guards tell whether ranks wait for one that will not come.

    Nothing is said as long as no rank waits longer than the limit: all may be compiling or validating. Of a rank
    that is waited for and at work one thing is said, and during the first step only much later. Of one that does
    nothing all is said, and after the second limit the job ends.

    Args:
        verdict: What is known of the ranks' ends and hosts.
        order: Gives an order to all guards.
        say: Shows a person a text.
        limits: How long ranks may wait.
        file: Where all stacks are written.
    """

    def __init__(
        self,
        verdict: Verdict,
        order: Callable[[int], None],
        say: Callable[[str], None],
        limits: Limits,
        file: Path,
    ) -> None:
        self._standing = Standing(verdict, limits.report / 2)
        self._order, self._say = order, say
        self._limits, self._file = limits, file
        self._next = 0.0
        self._asked: float | None = None
        self._said = Hope.WELL
        self._told: dict[int, int] = {}  # of each rank that was said to wait, which of its waits that was
        self._told_at = self._began = 0.0

    @property
    def beats(self) -> dict[int, Beat]:
        """Where each rank was last heard of."""
        return {number: rank.beat for number, rank in self._standing.ranks.items()}

    def hear(self, rank: int, kind: bytes, payload: bytes, now: float) -> None:
        """Take a guard's frame."""
        self._standing.hear(rank, kind, payload, now)

    def turn(self, now: float) -> Blame | None:
        """Judges; to be called often.

        Args:
            now: The time on this host's monotonic clock, in seconds.

        Returns:
            In whose name the job must end, once there is no more hope.
        """
        if not self._limits.report or now < self._next:
            return None
        self._next = now + self._limits.interval / 5
        self._see_them_go_on(now)
        hope = self._judge(now)
        if hope is Hope.WELL:
            self._asked = None
        elif self._asked is not None:
            return self._conclude(now)
        elif hope > self._said:
            self._asked = now
            self._standing.ask()
            self._order(protocol.LOOK)
        return None

    def _see_them_go_on(self, now: float) -> None:
        if self._told and not any(self._standing.still_waits(*each) for each in self._told.items()):
            self._say(f"hvdtrain: it goes on, after {now - self._began:.0f} s.")
            self._told, self._said = {}, Hope.WELL

    def _judge(self, now: float) -> Hope:
        waiting = self._standing.waiting(now)
        longest = max(waiting.values(), default=0.0)
        if longest < self._limits.report:
            return Hope.WELL
        late = self._standing.late(waiting)
        if self._hopeless(longest, late, now):
            return Hope.NONE
        if not late or not all(self._standing.works(number, now) for number in late):
            return Hope.STUCK
        compiling = self._standing.first_step() and longest < _COMPILING * self._limits.report
        return Hope.WELL if compiling else Hope.SLOW

    def _hopeless(self, longest: float, late: list[int], now: float) -> bool:
        """Return whether the second limit has passed since anything was last done, or so was said."""
        if not self._limits.abort or not self._told:
            return False
        quiet = min([longest, *(now - self._standing.last_sign(number, now) for number in late)])
        # What was said counts too, because this process itself may have been stopped since the last turn.
        said = now - self._told_at + self._limits.report
        return said >= self._limits.abort and (
            quiet >= self._limits.abort or longest >= _WORKING * self._limits.abort
        )

    def _conclude(self, now: float) -> Blame | None:
        """Once all have answered, or had the time to, says what they have told if it is still so."""
        assert self._asked is not None
        if not self._standing.all_answered() and now < self._asked + _ANSWERS:
            return None
        self._asked, self._next = None, now + self._limits.interval
        self._standing.close()
        hope = self._judge(now)
        if hope is Hope.NONE:
            return self._blame(now)
        if hope > self._said:
            self._tell(hope, now)
        return None

    def _tell(self, hope: Hope, now: float) -> None:
        waiting = self._standing.waiting(now)
        if not self._told:
            self._told_at, self._began = now, now - max(waiting.values())
        self._said = hope
        self._told = {number: self._standing.ranks[number].beat.waits for number in waiting}
        words = f"hvdtrain: {sentence(self._standing, now)}\n"
        if hope is Hope.SLOW:
            self._say(f"{words}Nothing is wrong as long as that goes on.")
        else:
            self._say(f"{words}{self._write(now)}{self._prospect()}")

    def _prospect(self) -> str:
        if not self._limits.abort:
            return ""
        limit = f"{self._limits.abort:g} s (HVDTRAIN_STALL_ABORT_SECONDS; 0 is never)"
        return f" The job is ended if nothing happens for {limit}."

    def _blame(self, now: float) -> Blame:
        waiting = self._standing.waiting(now)
        late = self._standing.late(waiting)
        idle = [number for number in late if not self._standing.works(number, now)]
        how = "it was waited for" if late else "nothing has happened for"
        limit = f"HVDTRAIN_STALL_ABORT_SECONDS={self._limits.abort:g}"
        self._write(now)
        text = f"{how} longer than {limit} allows: {sentence(self._standing, now)}"
        return Blame(next(iter([*idle, *late, *waiting])), text)

    def _write(self, now: float) -> str:
        """Write the stacks of all ranks to the file; returns what there is to say of it."""
        try:
            with self._file.open("a") as file:
                file.write(all_stacks(self._standing, now))
        except OSError as error:
            return f"The stacks of all ranks could not be written to {self._file}: {error.strerror}."
        return f"The stacks of all ranks are in {self._file}."
