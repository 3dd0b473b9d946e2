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
    """The result of one start.

    Args:
        code: The exit code.
        message: The last message on the screen; it ends with the traceback of the rank that failed first.
        summary: A summary in a few words.
        rank: The rank that failed first, or None.
        step: The step of that rank, counted over the whole training; None if it is not known.
        trace: Its traceback.
        lost: Whether that rank ended without a report, for example because its host was lost.
        up: Whether any rank has started.
        interrupted: Whether the job was ended by a signal to the launcher, such as Ctrl-C or SIGTERM.
    """

    code: int
    message: str = ""
    summary: str = "done"
    rank: int | None = None
    step: int | None = None
    trace: str = ""
    lost: bool = False
    up: bool = True
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
        return Ending(RESUMABLE, _resumable(verdict.resumable), "stopped, can go on", step=_last_step(job))
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
    """Return the result of a job that a signal has ended."""
    name = signal.Signals(number).name
    message = f"hvdtrain: ended by {name} after {seconds:.0f} s."
    return Ending(128 + number, message, f"ended by {name}", step=step, interrupted=True)


def _resumable(text: str) -> str:
    return f"hvdtrain: {text.rstrip('. ')} (exit code {RESUMABLE}, no failure)."


def _failure(job: Job, first: int) -> Ending:
    verdict = job.verdict
    return Ending(
        verdict.code(),
        _explanation(job) + verdict.sentence(),
        f"rank {first} {verdict.summary()}",
        rank=first,
        step=_step(job, first),
        trace=verdict.ranks[first].report.get("traceback", ""),
        lost=verdict.ranks[first].vanished,
    )


def _step(job: Job, rank: int) -> int | None:
    beat = job.beats.get(rank)
    return beat.step if beat else None


def _last_step(job: Job) -> int | None:
    steps = [step for rank in range(len(job.verdict.ranks)) if (step := _step(job, rank)) is not None]
    return max(steps, default=None)


def _explanation(job: Job) -> str:
    """Return the MPI launcher's message, if the rank that failed first has not reported a reason itself."""
    message = "" if job.verdict.explained else _shorten(job.launcher_output)
    return f"hvdtrain: message of the MPI launcher: {message}\n" if message else ""


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
