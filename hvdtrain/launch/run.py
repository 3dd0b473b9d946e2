"""Start a script on several ranks with the MPI of this machine, and report the result (`hvdtrain run`)."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdtrain.launch import restarts
from hvdtrain.launch.foreign_options import ForeignOption, apply_foreign_options
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.rank_environment import data_variable, deadline_variable, staged
from hvdtrain.launch.restarts import RemainingHosts, Start
from hvdtrain.launch.run_options import RunOptions, command_line, set_variables
from hvdtrain.launch.start_plan import Plan, clean_environ, make_plan, with_ranks
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.console import Console
from hvdtrain.launch.supervision.job import Interrupted, Job, hearing
from hvdtrain.launch.supervision.outcome import Ending, conclude, interrupted
from hvdtrain.stop_request import RESUMABLE

__all__ = ["RunOptions", "run"]


def run(options: RunOptions, foreign: Iterable[tuple[ForeignOption, Sequence[Any]]] = ()) -> int:
    """Run a script on several ranks and print the output of all; the first failure's traceback comes last.

    Args:
        options: The options of `hvdtrain run`.
        foreign: Options of other launchers and their values (see foreign_options.py).

    Returns:
        0 if the scripts of all ranks have ended successfully; 75 if the training has stopped on request and
        the same command continues it; else the exit code of the rank that failed first, 128 plus the number
        of a signal, or 2 if nothing could be started.
    """
    console, starts, begun = Console(options.verbose), list[Start](), time.monotonic()
    try:
        with hearing():
            code, message = _run(apply_foreign_options(options, foreign), console, starts)
    except LaunchError as error:
        code, message = 2, f"hvdtrain: {error}"
    except Interrupted as stop:
        code, message = _interrupted_between_starts(stop.number, time.monotonic() - begun)
    except BrokenPipeError:
        # The reader of our output is gone. Python must not flush to it again at exit, which would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if len(starts) > 1:
        console.say(restarts.report(starts))
    if message:
        console.say(message)
    return code


class DoneFile:
    """A file that is written only if every rank has succeeded; batch scripts check it.

    Exit codes of MPI launchers are not reliable enough for that.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        self._started = time.time()
        try:
            self._path.unlink(missing_ok=True)
            self._temporary.write_text("")
            self._temporary.unlink()
        except OSError as error:
            raise LaunchError(f"--done-file {path} cannot be written: {error.strerror}.") from error

    def write(self, hosts: Sequence[str]) -> None:
        """Write the ranks, hosts and duration of the job; the file appears with its full content or not at all."""
        facts = {
            "ranks": len(hosts),
            "hosts": sorted(set(hosts)),
            "started": round(self._started, 3),
            "seconds": round(time.time() - self._started, 3),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }
        try:
            with self._temporary.open("w") as file:
                file.write(json.dumps(facts) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._temporary.replace(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._temporary.unlink()
            raise LaunchError(
                f"every rank has done its work, but --done-file {self._path} cannot be written: {error.strerror}."
            ) from error


def _run(options: RunOptions, console: Console, starts: list[Start]) -> tuple[int, str]:
    """Start the job, restart it if needed, and return the exit code and the last message."""
    os.environ.update(set_variables(options))  # this process reads some of them too
    environ = clean_environ(os.environ)
    restarts.pause(environ, 0)  # raises now if HVDTRAIN_BACKOFF is invalid
    options = with_ranks(options, environ)
    environ |= data_variable(options.stage, environ) | deadline_variable(options.walltime, environ)
    environ[restarts.RESTART] = "0"
    environ[protocol.TYPED] = command_line(replace(options, as_horovod=False, wrap=False, scale_batch=False))
    plan = make_plan(options, environ)
    if options.dry_run:
        print(plan)
        return 0, ""
    if plan.note:
        console.say(plan.note)
    done = DoneFile(options.done_file) if options.done_file else None
    with staged(options.stage, environ):
        ending = _run_with_restarts(options, plan, environ, console, starts)
        if done and ending.code == 0:
            done.write(starts[-1].hosts)
    return ending.code, ending.message


def _run_with_restarts(
    options: RunOptions, plan: Plan, environ: dict[str, str], console: Console, starts: list[Start]
) -> Ending:
    """Restart the job until it succeeds or must not be restarted."""
    hosts = RemainingHosts(options.ranks)
    while True:
        # The settings of the first plan contain the result of slow checks, which later plans need not repeat.
        environ = {**environ, **plan.settings}
        starts.append(_start(options, plan, environ, hosts.ranks, console))
        last = starts[-1].ending
        objection = restarts.objection(starts, options.max_restarts)
        if objection is not None:
            return replace(last, message="\n".join(filter(None, (objection, last.message))))
        console.say(last.message)
        hosts = _wait(options, environ, len(starts), console)
        environ[restarts.RESTART] = str(len(starts))
        plan = make_plan(replace(options, num_proc=hosts.ranks), environ, hosts.left)


def _start(
    options: RunOptions, plan: Plan, environ: Mapping[str, str], ranks: int, console: Console
) -> Start:
    """Start the ranks once and wait until they have ended."""
    begun = time.monotonic()
    job = Job(ranks, console, options.verbose, plan.addresses)
    status = job.run(plan.command, environ)
    console.finish()
    seconds = time.monotonic() - begun
    hosts = [rank.host for rank in job.verdict.ranks if rank.up]
    return Start(ranks, hosts, seconds, conclude(job, status, seconds))


def _wait(options: RunOptions, environ: Mapping[str, str], started: int, console: Console) -> RemainingHosts:
    """Wait before a restart, and return the hosts to restart on."""
    seconds = restarts.pause(environ, started - 1)
    number = f"start {started + 1} of at most {options.max_restarts + 1}"
    console.say(f"hvdtrain: {number} follows in {seconds:g} s.")
    time.sleep(seconds)
    found = restarts.find_remaining(options, environ)
    if found.note:
        console.say(f"hvdtrain: {found.note}.")
    return found


def _interrupted_between_starts(number: int, seconds: float) -> tuple[int, str]:
    """Return the exit code and the message for a signal that came while no ranks were running."""
    if number == signal.SIGUSR1:
        request = "hvdtrain: asked to stop by SIGUSR1 while no ranks were running"
        return RESUMABLE, (
            f"{request}; the same command continues from the last checkpoint (exit code {RESUMABLE})."
        )
    ending = interrupted(number, seconds)
    return ending.code, ending.message
