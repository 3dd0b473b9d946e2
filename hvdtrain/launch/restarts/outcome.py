"""How one start of the ranks ended: the exit code, the last words, and what a restart must know of it."""

import itertools
import re
import signal
from dataclasses import dataclass

from hvdtrain.launch.supervision.job import Job
from hvdtrain.stop_request import RESUMABLE

# What MPI launchers say whenever a rank has ended badly; how it did is known better here.
_ROUTINE = re.compile(
    r"Primary job +terminated normally|noticed that process rank|exited with non-zero|BAD TERMINATION"
    r"|EXIT STRING|ORTE_ERROR_LOG|Process name:|MPI_ABORT|MPI_Abort|problem with your application|KILLED BY"
)


@dataclass(frozen=True)
class Ending:
    """How one start ended.

    Args:
        code: The exit code.
        words: The last words on the screen, the traceback of the rank that failed first in the end.
        summary: The same in a few words.
        rank: Which rank failed first; None where none did.
        step: The step it was at, counted over the whole training; None where that is not known.
        trace: Its traceback.
        lost: Whether that rank was lost without a word, as with its host.
        up: Whether any rank came to life.
        interrupted: Whether it was ended from outside, by Ctrl-C or SIGTERM.
    """

    code: int
    words: str = ""
    summary: str = "done"
    rank: int | None = None
    step: int | None = None
    trace: str = ""
    lost: bool = False
    up: bool = True
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        """Whether something went wrong that another start may mend."""
        return not self.interrupted and self.code not in (0, RESUMABLE)


def conclude(job: Job, status: int, seconds: float) -> Ending:
    """Judge a job that has ended.

    Args:
        job: The job.
        status: The MPI launcher's exit code, minus the number of the signal where one ended it.
        seconds: How long it took.
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
        words = f"hvdtrain: the MPI launcher was killed by signal {-status} before its ranks had ended."
        return Ending(128 - status, words, f"the MPI launcher was killed by signal {-status}")
    up = len(verdict.missing) < len(verdict.ranks)
    return Ending(status or 1, _never_up(job, status), "ranks never came to life", up=up)


def interrupted(number: int, seconds: float, step: int | None = None) -> Ending:
    """Say that a signal has ended it all."""
    name = signal.Signals(number).name
    words = f"hvdtrain: ended by {name} after {seconds:.0f} s."
    return Ending(128 + number, words, f"ended by {name}", step=step, interrupted=True)


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
    """Add what the MPI launcher said about a rank that could not say anything itself."""
    words = "" if job.verdict.explained else _first_words(job.said)
    return f"hvdtrain: the MPI launcher said: {words}\n" if words else ""


def _never_up(job: Job, status: int) -> str:
    """Say what the MPI launcher said when ranks never came to life."""
    missing, size = job.verdict.missing, len(job.verdict.ranks)
    named = f"rank(s) {', '.join(map(str, missing))} of {size} never"
    who = f"none of the {size} ranks" if len(missing) == size else named
    words = _first_words(job.said)
    said = f" It said: {words}" if words else " Type the same with -v to see what it says."
    return f"hvdtrain: {who} came to life; the MPI launcher ended with exit code {status}.{said}"


def _first_words(said: str) -> str:
    """Take the beginning of an MPI launcher's message, without its rules and tags, as one line."""
    lines = [re.sub(r"^\[[^\]]*\] ", "", line).strip(" -=|#*") for line in said.splitlines()]
    paragraphs = [" ".join(lines) for told, lines in itertools.groupby(lines, bool) if told]
    told = [words for words in paragraphs if not _ROUTINE.search(words)]
    # A paragraph may be no more than the heading of the next.
    words = " ".join(told[: 1 if not told or len(told[0]) > 80 else 2])
    return words if len(words) < 600 else words[:600].rpartition(" ")[0] + " ..."
