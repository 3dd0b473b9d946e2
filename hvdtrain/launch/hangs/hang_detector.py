"""Detect ranks that wait too long, report which rank waits for which, and end a job that hangs."""

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from hvdtrain.heartbeat import Beat
from hvdtrain.launch.hangs.hang_messages import all_stacks, sentence
from hvdtrain.launch.hangs.rank_states import RankStates
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.verdict import Verdict
from hvdtrain.timeouts import Limits

# The exit code of timeout(1).
CODE = 124
_ANSWERS = 5.0  # seconds for the guards to answer a request for details
# Factors for the limits if the rank that is waited for is working: for the report in the first step, which may
# contain a long compilation, and for ending the job.
_COMPILING = 5
_WORKING = 6


class Severity(enum.IntEnum):
    """The severity of a wait."""

    NORMAL = 0
    SLOW = 1  # ranks wait for ranks that are working
    STUCK = 2  # ranks wait for ranks that do nothing
    FATAL = 3  # and these have done nothing for longer than the second limit


@dataclass(frozen=True)
class HangFailure:
    """The rank that is reported as failed when a hanging job is ended, and the reason.

    Args:
        rank: The rank.
        text: The reason; it continues a sentence about the rank.
    """

    rank: int
    text: str

    @property
    def report(self) -> bytes:
        """The failure as a report of the rank itself, in the format of a REPORT frame."""
        return json.dumps({"done": False, "code": CODE, "text": self.text, "traceback": ""}).encode()


@final
class HangDetector:
    """Decide from the reports of the guards whether ranks wait for a rank that will not continue.

    Nothing is reported as long as no rank waits longer than the limit: all may be compiling or validating. If the
    rank that is waited for is working, a short message is printed, and during the first step only much later. If it
    does nothing, a full report is printed, and after the second limit the job is ended.

    Args:
        verdict: The hosts and results of the ranks.
        order: Sends an order to all guards.
        say: Prints a message.
        limits: The time limits.
        file: The file for the stacks of all ranks.
    """

    def __init__(
        self,
        verdict: Verdict,
        order: Callable[[int], None],
        say: Callable[[str], None],
        limits: Limits,
        file: Path,
    ) -> None:
        self._states = RankStates(verdict, limits.report / 2)
        self._order, self._say = order, say
        self._limits, self._file = limits, file
        self._next_check = 0.0
        self._asked_at: float | None = None
        self._reported = Severity.NORMAL
        self._reported_waits: dict[
            int, int
        ] = {}  # rank -> number of its wait, for each rank in the last report
        self._reported_at = self._began = 0.0

    @property
    def beats(self) -> dict[int, Beat]:
        """The last report about each rank."""
        return {number: rank.beat for number, rank in self._states.ranks.items()}

    def receive(self, rank: int, kind: bytes, payload: bytes, now: float) -> None:
        """Record the content of a guard's frame."""
        self._states.receive(rank, kind, payload, now)

    def check(self, now: float) -> HangFailure | None:
        """Judges; to be called often.

        Args:
            now: The time on this host's monotonic clock, in seconds.

        Returns:
            The failure with which the job must end, or None.
        """
        if not self._limits.report or now < self._next_check:
            return None
        self._next_check = now + self._limits.interval / 5
        self._check_progress(now)
        severity = self._severity(now)
        if severity is Severity.NORMAL:
            self._asked_at = None
        elif self._asked_at is not None:
            return self._use_answers(now)
        elif severity > self._reported:
            self._asked_at = now
            self._states.ask()
            self._order(protocol.LOOK)
        return None

    def _check_progress(self, now: float) -> None:
        """Report that the ranks continue, once none of the reported waits lasts any more."""
        still_waiting = [self._states.still_waits(rank, wait) for rank, wait in self._reported_waits.items()]
        if still_waiting and not any(still_waiting):
            self._say(f"hvdtrain: the ranks continue, after {now - self._began:.0f} s.")
            self._reported_waits, self._reported = {}, Severity.NORMAL

    def _severity(self, now: float) -> Severity:
        waiting = self._states.waiting(now)
        longest = max(waiting.values(), default=0.0)
        if longest < self._limits.report:
            return Severity.NORMAL
        late = self._states.late(waiting)
        if self._is_fatal(longest, late, now):
            return Severity.FATAL
        if not late or not all(self._states.works(number, now) for number in late):
            return Severity.STUCK
        compiling = self._states.first_step() and longest < _COMPILING * self._limits.report
        return Severity.NORMAL if compiling else Severity.SLOW

    def _is_fatal(self, longest: float, late: list[int], now: float) -> bool:
        """Return whether the second limit has passed since the last progress and since the report."""
        if not self._limits.abort or not self._reported_waits:
            return False
        quiet = min([longest, *(now - self._states.last_sign(number, now) for number in late)])
        # The time since the report counts too: this process itself may have been stopped since the last check.
        reported = now - self._reported_at + self._limits.report
        return reported >= self._limits.abort and (
            quiet >= self._limits.abort or longest >= _WORKING * self._limits.abort
        )

    def _use_answers(self, now: float) -> HangFailure | None:
        """Report the hang if it still exists when all guards have answered or the time for answers is over."""
        assert self._asked_at is not None
        if not self._states.all_answered() and now < self._asked_at + _ANSWERS:
            return None
        self._asked_at, self._next_check = None, now + self._limits.interval
        self._states.close()
        severity = self._severity(now)
        if severity is Severity.FATAL:
            return self._failure(now)
        if severity > self._reported:
            self._report(severity, now)
        return None

    def _report(self, severity: Severity, now: float) -> None:
        waiting = self._states.waiting(now)
        if not self._reported_waits:
            self._reported_at, self._began = now, now - max(waiting.values())
        self._reported = severity
        self._reported_waits = {number: self._states.ranks[number].beat.waits for number in waiting}
        message = f"hvdtrain: {sentence(self._states, now)}\n"
        if severity is Severity.SLOW:
            self._say(f"{message}Nothing is wrong as long as that continues.")
        else:
            self._say(f"{message}{self._write_stacks(now)}{self._abort_notice()}")

    def _abort_notice(self) -> str:
        if not self._limits.abort:
            return ""
        limit = f"{self._limits.abort:g} s (HVDTRAIN_STALL_ABORT_SECONDS; 0 is never)"
        return f" The job is ended if nothing happens for {limit}."

    def _failure(self, now: float) -> HangFailure:
        waiting = self._states.waiting(now)
        late = self._states.late(waiting)
        idle = [number for number in late if not self._states.works(number, now)]
        reason = "other ranks have waited for it" if late else "nothing has happened for"
        limit = f"HVDTRAIN_STALL_ABORT_SECONDS={self._limits.abort:g}"
        self._write_stacks(now)
        text = f"{reason} longer than {limit} allows: {sentence(self._states, now)}"
        return HangFailure(next(iter([*idle, *late, *waiting])), text)

    def _write_stacks(self, now: float) -> str:
        """Write the stacks of all ranks to the file, and return a message about it."""
        try:
            with self._file.open("a") as file:
                file.write(all_stacks(self._states, now))
        except OSError as error:
            return f"The stacks of all ranks could not be written to {self._file}: {error.strerror}."
        return f"The stacks of all ranks are in {self._file}."
