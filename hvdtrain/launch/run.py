"""`hvdtrain run`: starts a script on several ranks with the MPI found here, and says what became of it."""

import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hvdtrain.launch import data_staging
from hvdtrain.launch.foreign_options import Foreign, understand
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.restarts import restart_policy, walltime
from hvdtrain.launch.restarts.outcome import Ending, conclude, interrupted
from hvdtrain.launch.restarts.remaining_hosts import World, world
from hvdtrain.launch.restarts.restart_policy import Start
from hvdtrain.launch.run_options import RunOptions, command_line, set_variables
from hvdtrain.launch.start_plan import Plan, clean_environ, make_plan, with_ranks
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.console import Console
from hvdtrain.launch.supervision.done_file import DoneFile
from hvdtrain.launch.supervision.interrupt import Interrupted, hearing
from hvdtrain.launch.supervision.job import Job
from hvdtrain.stop_request import RESUMABLE

__all__ = ["RunOptions", "run"]


def run(options: RunOptions, foreign: Iterable[tuple[Foreign, Sequence[Any]]] = ()) -> int:
    """Run a script on several ranks: one screen, one exit code, and the first failure's traceback last.

    Args:
        options: What was asked for.
        foreign: What was asked for besides in the words of other launchers (see foreign.py).

    Returns:
        0 when every rank has shown that its script came to its end; 75 when the training was asked to stop and
        the same command goes on from there; else the exit code of the rank that failed first, 128 plus the
        number of a signal, or 2 when nothing could be started.
    """
    console, starts, begun = Console(options.verbose), list[Start](), time.monotonic()
    try:
        with hearing():
            code, words = _run(understand(options, foreign), console, starts)
    except LaunchError as error:
        code, words = 2, f"hvdtrain: {error}"
    except Interrupted as stop:
        code, words = _between_starts(stop.number, time.monotonic() - begun)
    except BrokenPipeError:
        # Nobody reads what the ranks print. Python must not try once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if len(starts) > 1:
        console.say(restart_policy.report(starts))
    if words:
        console.say(words)
    return code


def _run(options: RunOptions, console: Console, starts: list[Start]) -> tuple[int, str]:
    """Start the ranks, as often as need be, and gives the exit code and the last words."""
    os.environ.update(set_variables(options))  # the launcher reads some of them, too
    environ = clean_environ(os.environ)
    restart_policy.pause(environ, 0)
    options = with_ranks(options, environ)
    environ |= data_staging.told(options.stage, environ) | walltime.told(options.walltime, environ)
    environ[restart_policy.RESTART] = "0"
    environ[protocol.TYPED] = command_line(replace(options, as_horovod=False, wrap=False, scale_batch=False))
    plan = make_plan(options, environ)
    if options.dry_run:
        print(plan)
        return 0, ""
    if plan.note:
        console.say(plan.note)
    done = DoneFile(options.done_file) if options.done_file else None
    with data_staging.staged(options.stage, environ):
        ending = _persevere(options, plan, environ, console, starts)
        if done and ending.code == 0:
            done.write(starts[-1].hosts)
    return ending.code, ending.words


def _persevere(
    options: RunOptions, plan: Plan, environ: dict[str, str], console: Console, starts: list[Start]
) -> Ending:
    """Start the ranks until there is nothing more to be had from it."""
    asked = World(options.ranks)
    while True:
        # What the first plan has found out need not be found out again.
        environ = {**environ, **plan.settings}
        starts.append(_start(options, plan, environ, asked.ranks, console))
        last = starts[-1].ending
        reason = restart_policy.objection(starts, options.max_restarts)
        if reason is not None:
            return replace(last, words="\n".join(filter(None, (reason, last.words))))
        console.say(last.words)
        asked = _wait(options, environ, len(starts), console)
        environ[restart_policy.RESTART] = str(len(starts))
        plan = make_plan(replace(options, num_proc=asked.ranks), environ, asked.left)


def _start(
    options: RunOptions, plan: Plan, environ: Mapping[str, str], ranks: int, console: Console
) -> Start:
    """Start the ranks once and stays with them to their end."""
    begun = time.monotonic()
    job = Job(ranks, console, options.verbose, plan.addresses)
    status = job.run(plan.command, environ)
    console.finish()
    seconds = time.monotonic() - begun
    hosts = [rank.host for rank in job.verdict.ranks if rank.up]
    return Start(ranks, hosts, seconds, conclude(job, status, seconds))


def _wait(options: RunOptions, environ: Mapping[str, str], restarts: int, console: Console) -> World:
    """Let some time pass before a restart, and finds out where it can be."""
    seconds = restart_policy.pause(environ, restarts - 1)
    after = f"hvdtrain: start {restarts + 1} of at most {options.max_restarts + 1} follows"
    console.say(f"{after} in {seconds:g} s.")
    time.sleep(seconds)
    found = world(options, environ)
    if found.note:
        console.say(f"hvdtrain: {found.note}.")
    return found


def _between_starts(number: int, seconds: float) -> tuple[int, str]:
    """Return the exit code and the last words for a signal that came while no ranks were up."""
    if number == signal.SIGUSR1:
        words = "hvdtrain: asked to stop by SIGUSR1 while no ranks were up"
        return (
            RESUMABLE,
            f"{words}; the same command goes on from the last checkpoint (exit code {RESUMABLE}).",
        )
    ending = interrupted(number, seconds)
    return ending.code, ending.words
