"""Detect ranks that wait too long, report which rank waits for which, and end a job that hangs."""

import enum
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import final

from hvdtrain.heartbeat import Limits
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.hang_messages import Waits, all_stacks, innermost_file, sentence
from hvdtrain.launch.supervision.verdict import RankState, Verdict

# The exit code of timeout(1).
CODE = 124
_ANSWERS = 5.0  # seconds for the guards to answer a request for details
# Factors for the limits if the rank that is waited for is working: for the report in the first step, which may
# contain a long compilation, and for ending the job.
_COMPILING = 5
_WORKING = 6
# The kernel's letters for a process that is stopped by a signal, and for one stopped by a debugger.
_STOPPED = ("T", "t")


class Severity(enum.IntEnum):
    """The severity of a wait."""

    NORMAL = 0
    SLOW = 1  # ranks wait for ranks that are working
    STUCK = 2  # ranks wait for ranks that do nothing
    FATAL = 3  # and these have done nothing for longer than the second limit


@final
class HangDetector:
    """Decide from the reports of the guards whether ranks wait for a rank that will not continue.

    Nothing is reported as long as no rank waits longer than the limit: all may be compiling or validating. If the
    rank that is waited for is working, a short message is printed, and during the first step only much later. If it
    does nothing, a full report is printed, and after the second limit the job is ended.

    Args:
        verdict: What is known about the ranks; the failure of a job that must end is recorded there.
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
        self._verdict, self._ranks = verdict, verdict.ranks
        self._order, self._say = order, say
        self._limits, self._file = limits, file
        self._next_check = 0.0
        self._asked_at: float | None = None
        self._reported = Severity.NORMAL
        # Rank -> number of its wait, for each rank in the last report.
        self._reported_waits: dict[int, int] = {}
        self._reported_at = self._began = 0.0

    def check(self, now: float) -> bool:
        """Judge the state at a time on this host's monotonic clock; to be called often.

        Returns:
            Whether the job must end; the rank that the others wait for has then failed in the verdict.
        """
        if not self._limits.report or now < self._next_check:
            return False
        self._next_check = now + self._limits.interval / 5
        self._check_progress(now)
        severity = self._severity(self._waits(now), now)
        if severity is Severity.NORMAL:
            self._asked_at = None
        elif self._asked_at is not None:
            return self._use_answers(now)
        elif severity > self._reported:
            self._asked_at = now
            for rank in self._ranks:
                rank.answer, rank.unheard = {}, _reports(rank)
            self._order(protocol.LOOK)
        return False

    def _check_progress(self, now: float) -> None:
        """Report that the ranks continue, once none of the reported waits lasts any more."""
        beats = [(self._ranks[number].beat, waits) for number, waits in self._reported_waits.items()]
        if beats and not any(beat.waiting is not None and beat.waits == waits for beat, waits in beats):
            self._say(f"hvdtrain: the ranks continue, after {now - self._began:.0f} s.")
            self._reported_waits, self._reported = {}, Severity.NORMAL

    def _waits(self, now: float) -> Waits:
        """Return which ranks wait, which they wait for, and which ranks work."""
        waiting = {
            number: now - rank.since
            for number, rank in enumerate(self._ranks)
            if rank.since is not None and not _excused(rank)
        }
        awaited: set[int] = set()
        for number in waiting:
            awaited |= _members(self._ranks[number].beat.among, len(self._ranks))
        # For a while after its last progress a rank still counts as working.
        grace = self._limits.report / 2
        working = {
            number
            for number, rank in enumerate(self._ranks)
            if _runs(rank) and (rank.beat.busy or now - rank.alive < grace)
        }
        return Waits(waiting, sorted(awaited - set(waiting)), working)

    def _severity(self, waits: Waits, now: float) -> Severity:
        longest = max(waits.waiting.values(), default=0.0)
        if longest < self._limits.report:
            return Severity.NORMAL
        if self._is_fatal(waits, longest, now):
            return Severity.FATAL
        if not waits.late or not waits.working.issuperset(waits.late):
            return Severity.STUCK
        first_step = all((rank.beat.step or 0) <= 1 for rank in self._ranks)
        compiling = first_step and longest < _COMPILING * self._limits.report
        return Severity.NORMAL if compiling else Severity.SLOW

    def _is_fatal(self, waits: Waits, longest: float, now: float) -> bool:
        """Return whether the second limit has passed since the last progress and since the report."""
        if not self._limits.abort or not self._reported_waits:
            return False
        quiet = longest
        for number in waits.late:
            rank = self._ranks[number]
            last_sign = now if rank.beat.busy and number in waits.working else rank.alive
            quiet = min(quiet, now - last_sign)
        # The time since the report counts too: this process itself may have been stopped since the last check.
        reported = now - self._reported_at + self._limits.report
        return reported >= self._limits.abort and (
            quiet >= self._limits.abort or longest >= _WORKING * self._limits.abort
        )

    def _use_answers(self, now: float) -> bool:
        """Report the hang if it still exists when all guards have answered or the time for answers is over."""
        assert self._asked_at is not None
        answered = all(rank.answer for rank in self._ranks if _reports(rank) and not rank.gone)
        if not answered and now < self._asked_at + _ANSWERS:
            return False
        self._asked_at, self._next_check = None, now + self._limits.interval
        any_answered = any(rank.answer for rank in self._ranks)
        for rank in self._ranks:
            rank.silent = any_answered and rank.unheard
        waits = self._waits(now)
        severity = self._severity(waits, now)
        if severity is Severity.FATAL:
            self._fail(waits, now)
            return True
        if severity > self._reported:
            self._report(severity, waits, now)
        return False

    def _report(self, severity: Severity, waits: Waits, now: float) -> None:
        if not self._reported_waits:
            self._reported_at, self._began = now, now - max(waits.waiting.values())
        self._reported = severity
        self._reported_waits = {number: self._ranks[number].beat.waits for number in waits.waiting}
        message = f"hvdtrain: {sentence(self._ranks, waits)}\n"
        if severity is Severity.SLOW:
            self._say(f"{message}Nothing is wrong as long as that continues.")
            return
        message += self._write_stacks(waits)
        if self._limits.abort:
            limit = f"{self._limits.abort:g} s (HVDTRAIN_STALL_ABORT_SECONDS; 0 is never)"
            message += f" The job is ended if nothing happens for {limit}."
        self._say(message)

    def _fail(self, waits: Waits, now: float) -> None:
        """Record a failure of the rank that the others wait for, as if it had reported it itself."""
        idle = [number for number in waits.late if number not in waits.working]
        reason = "other ranks have waited for it" if waits.late else "nothing has happened for"
        limit = f"HVDTRAIN_STALL_ABORT_SECONDS={self._limits.abort:g}"
        self._write_stacks(waits)
        text = f"{reason} longer than {limit} allows: {sentence(self._ranks, waits)}"
        report = json.dumps({"done": False, "code": CODE, "text": text, "traceback": ""})
        self._verdict.note([*idle, *waits.late, *waits.waiting][0], protocol.REPORT, report.encode(), now)

    def _write_stacks(self, waits: Waits) -> str:
        """Write the stacks of all ranks to the file, and return a message about it."""
        try:
            with self._file.open("a") as file:
                file.write(all_stacks(self._ranks, waits))
        except OSError as error:
            return f"The stacks of all ranks could not be written to {self._file}: {error.strerror}."
        return f"The stacks of all ranks are in {self._file}."


def _reports(rank: RankState) -> bool:
    """Return whether the guard of a rank has ever reported its position."""
    return rank.beat.pid != 0


def _runs(rank: RankState) -> bool:
    return _reports(rank) and not rank.gone and not rank.silent and rank.beat.state not in _STOPPED


def _excused(rank: RankState) -> bool:
    """Return whether a rank that has recorded a wait is not really waiting.

    A stopped rank does not wait. In Horovod's core the wait may be over without a record; then the process is busy,
    or its main thread is outside of TensorFlow.
    """
    beat, answer = rank.beat, rank.answer
    if not _runs(rank) or (beat.loose and beat.busy):
        return True
    if not beat.loose or not answer or answer["beat"]["waits"] != beat.waits:
        return False
    return "/tensorflow/" not in innermost_file(answer["stacks"])


def _members(among: str, size: int) -> set[int]:
    """Return the ranks of a process set from its description; all ranks if it is empty."""
    members: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", among):
        members.update(range(int(first), int(last or first) + 1))
    return members & set(range(size)) or set(range(size))
