"""`hvdtrain run`: starts a script on several ranks with the MPI found here, and says what became of it."""

import itertools
import os
import re
import signal
import sys
from collections.abc import Mapping

from hvdtrain.launch import staging
from hvdtrain.launch.console import Console
from hvdtrain.launch.done import DoneFile
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.job import Job
from hvdtrain.launch.plan import Plan, RunOptions, clean_environ, make_plan

__all__ = ["RunOptions", "run"]

# What MPI launchers say whenever a rank has ended badly; how it did is known better here.
_ROUTINE = re.compile(
    r"Primary job +terminated normally|noticed that process rank|exited with non-zero|BAD TERMINATION"
    r"|EXIT STRING|ORTE_ERROR_LOG|Process name:|MPI_ABORT|MPI_Abort|problem with your application|KILLED BY"
)


def run(options: RunOptions) -> int:
    """Runs a script on several ranks: one screen, one exit code, and the first failure's traceback last.

    Args:
        options: What was asked for.

    Returns:
        0 when every rank has shown that its script came to its end; else the exit code of the rank that
        failed first, 128 plus the number of a signal, or 2 when nothing could be started.
    """
    environ = clean_environ(os.environ)
    try:
        environ |= staging.told(options.stage, environ)
        plan = make_plan(options, environ)
    except LaunchError as error:
        print(f"hvdtrain: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print(plan)
        return 0
    try:
        done = DoneFile(options.done_file) if options.done_file else None
        with staging.staged(options.stage, environ):
            return _start(options, plan, {**environ, **plan.settings}, done)
    except LaunchError as error:
        print(f"hvdtrain: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Nobody reads what the ranks print. Python must not try once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _start(options: RunOptions, plan: Plan, environ: Mapping[str, str], done: DoneFile | None) -> int:
    console = Console(options.verbose)
    job = Job(options.num_proc, console, options.verbose, plan.addresses)
    status = job.run(plan.command, environ)
    console.finish()
    code, sentence = _conclude(job, status)
    if sentence:
        console.say(sentence)
    if done and job.verdict.succeeded and code == 0:
        done.write([rank.host for rank in job.verdict.ranks])
    return code


def _conclude(job: Job, status: int) -> tuple[int, str]:
    """Gives the exit code and the last words."""
    verdict = job.verdict
    if job.interrupted:
        return 128 + job.interrupted, ""
    if verdict.succeeded:
        return 0, ""
    if verdict.first is not None:
        return verdict.code(), _explanation(job) + verdict.sentence()
    if status < 0:
        return (
            128 - status,
            f"hvdtrain: the MPI launcher was killed by signal {-status} before its ranks had ended.",
        )
    return status or 1, _never_up(job, status)


def _explanation(job: Job) -> str:
    """Adds what the MPI launcher said about a rank that could not say anything itself."""
    words = "" if job.verdict.explained else _first_words(job.said)
    return f"hvdtrain: the MPI launcher said: {words}\n" if words else ""


def _never_up(job: Job, status: int) -> str:
    """Says what the MPI launcher said when ranks never came to life."""
    missing, size = job.verdict.missing, len(job.verdict.ranks)
    named = f"rank(s) {', '.join(map(str, missing))} of {size} never"
    who = f"none of the {size} ranks" if len(missing) == size else named
    words = _first_words(job.said)
    said = f" It said: {words}" if words else " Type the same with -v to see what it says."
    return f"hvdtrain: {who} came to life; the MPI launcher ended with exit code {status}.{said}"


def _first_words(said: str) -> str:
    """Takes the beginning of an MPI launcher's message, without its rules and tags, as one line."""
    lines = [re.sub(r"^\[[^\]]*\] ", "", line).strip(" -=|#*") for line in said.splitlines()]
    paragraphs = [" ".join(lines) for told, lines in itertools.groupby(lines, bool) if told]
    told = [words for words in paragraphs if not _ROUTINE.search(words)]
    # A paragraph may be no more than the heading of the next.
    words = " ".join(told[: 1 if not told or len(told[0]) > 80 else 2])
    return words if len(words) < 600 else words[:600].rpartition(" ")[0] + " ..."
