"""Summarize how one start of the ranks has ended: exit code, message, and the facts that a restart depends on."""

import itertools
import re
import signal
from dataclasses import dataclass

from hvdtrain.launch.supervision.job import Job
from hvdtrain.stop_request import RESUMABLE

# Messages of MPI launchers about any failed rank. They are not shown, because the guard reports more detail.
_ROUTINE_MESSAGES = re.compile(
    r"Primary job +terminated normally|noticed that process rank|exited with non-zero|BAD TERMINATION"
    r"|EXIT STRING|ORTE_ERROR_LOG|Process name:|MPI_ABORT|MPI_Abort|problem with your application|KILLED BY"
)


@dataclass(frozen=True)
class Ending:
    """The result of one start."""

    code: int  # the exit code
    # The last message on the screen; it ends with the traceback of the rank that failed first.
    message: str = ""
    summary: str = "done"  # a summary in a few words
    rank: int | None = None  # the rank that failed first, or None
    step: int | None = None  # the step of that rank, counted over the whole training; None if it is not known
    trace: str = ""  # its traceback
    lost: bool = False  # whether that rank ended without a report, for example because its host was lost
    up: bool = True  # whether any rank has started
    # Whether the job was ended by a signal to the launcher, such as Ctrl-C or SIGTERM.
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        """Whether the start has ended with an error, so that a restart may succeed."""
        return not self.interrupted and self.code not in (0, RESUMABLE)


def conclude(job: Job, status: int, seconds: float) -> Ending:
    """Return the result of a job that has ended.

    Args:
        job: The job.
        status: Exit code of the MPI launcher, or minus the number of the signal that ended it.
        seconds: Duration of the job.
    """
    verdict = job.verdict
    if verdict.resumable is not None:
        text = verdict.resumable.rstrip(". ")
        message = f"hvdtrain: {text} (exit code {RESUMABLE}, no failure)."
        return Ending(RESUMABLE, message, "stopped, can go on", step=_last_step(job))
    if job.interrupted:
        return interrupted(job.interrupted, seconds, _last_step(job))
    if verdict.succeeded:
        return Ending(0, step=_last_step(job))
    if verdict.first is not None:
        return _failure(job, verdict.first)
    if status < 0:
        message = f"hvdtrain: the MPI launcher was killed by signal {-status} before its ranks had ended."
        return Ending(128 - status, message, f"the MPI launcher was killed by signal {-status}")
    up = len(verdict.missing) < len(verdict.ranks)
    return Ending(status or 1, _never_started(job, status), "not all ranks have started", up=up)


def interrupted(number: int, seconds: float, step: int | None = None) -> Ending:
    """Return the result of a start that a signal has ended."""
    name = signal.Signals(number).name
    message = f"hvdtrain: ended by {name} after {seconds:.0f} s."
    return Ending(128 + number, message, f"ended by {name}", step=step, interrupted=True)


def _failure(job: Job, first: int) -> Ending:
    verdict = job.verdict
    # The MPI launcher's message counts if the rank has not reported a reason itself.
    message = "" if verdict.explained else _shorten(job.launcher_output)
    explanation = f"hvdtrain: message of the MPI launcher: {message}\n" if message else ""
    return Ending(
        verdict.code(),
        explanation + verdict.sentence(),
        f"rank {first} {verdict.summary()}",
        rank=first,
        step=job.verdict.ranks[first].beat.step,
        trace=verdict.ranks[first].report.get("traceback", ""),
        lost=verdict.ranks[first].vanished,
    )


def _last_step(job: Job) -> int | None:
    steps = [rank.beat.step for rank in job.verdict.ranks]
    return max((step for step in steps if step is not None), default=None)


def _never_started(job: Job, status: int) -> str:
    """Return a message about ranks that never started, with the message of the MPI launcher."""
    missing, size = job.verdict.missing, len(job.verdict.ranks)
    named = f"rank(s) {', '.join(map(str, missing))} of {size} never"
    ranks = f"none of the {size} ranks" if len(missing) == size else named
    message = _shorten(job.launcher_output)
    advice = f" Its message: {message}" if message else " Run the same command with -v to see its output."
    return f"hvdtrain: {ranks} started; the MPI launcher ended with exit code {status}.{advice}"


def _shorten(output: str) -> str:
    """Return the first paragraph of an MPI launcher's output that is not routine, without rulers and tags."""
    lines = [re.sub(r"^\[[^\]]*\] ", "", line).strip(" -=|#*") for line in output.splitlines()]
    paragraphs = [" ".join(group) for filled, group in itertools.groupby(lines, bool) if filled]
    informative = [paragraph for paragraph in paragraphs if not _ROUTINE_MESSAGES.search(paragraph)]
    # A short first paragraph may be the heading of the next.
    count = 1 if not informative or len(informative[0]) > 80 else 2
    message = " ".join(informative[:count])
    return message if len(message) < 600 else message[:600].rpartition(" ")[0] + " ..."
