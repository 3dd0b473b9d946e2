"""Decide whether, after which pause and on which hosts a failed job is restarted (`--max-restarts`)."""

import io
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hvdtrain import settings
from hvdtrain.launch.hosts import Host, LaunchError, all_local, run_captured
from hvdtrain.launch.launchers import mpirun, slurm
from hvdtrain.launch.run_options import RunOptions
from hvdtrain.launch.start_plan import find_hosts, in_allocation
from hvdtrain.launch.supervision.outcome import Ending

# The number of this start, counted from 0, as a variable for the ranks.
RESTART = "HVDTRAIN_RESTART"
# Seconds before the first restart; the pause doubles with each further restart.
BACKOFF = "HVDTRAIN_BACKOFF"
LONGEST = 60.0
TIMEOUT = 30.0  # seconds for a host to start a program that does nothing

# Failures that a restart cannot fix: a usage error of argparse, a script that Python cannot parse or import.
_WRONG = re.compile(
    r"failed: (it called sys\.exit\(2\)|(Syntax|Indentation|Tab|ModuleNotFound|Import)Error\b)"
)

# If no step is known, the number of identical tracebacks after which the job is not restarted. A network or disk
# may fail twice.
_SAME_TRACES = 3


@dataclass(frozen=True)
class Start:
    """One start of the ranks and its result."""

    ranks: int  # the number of ranks
    hosts: Sequence[str]  # the hosts of the ranks that have started, one entry per rank
    seconds: float  # its duration
    ending: Ending  # its result


@dataclass(frozen=True)
class RemainingHosts:
    """The hosts of a restart."""

    ranks: int  # the number of ranks to start
    left: tuple[Host, ...] = ()  # the hosts to start them on; empty for all requested hosts
    note: str = ""  # a message about hosts that do not answer; may be empty


def pause(environ: Mapping[str, str], restarts: int) -> float:
    """Return the seconds to wait before a restart: HVDTRAIN_BACKOFF, doubled with each restart, at most 60."""
    text = settings.get(BACKOFF, environ)
    try:
        first = float(text)
    except ValueError:
        first = -1
    if not 0 <= first <= LONGEST:
        raise LaunchError(f"{BACKOFF} is {text!r}; expected seconds from 0 to {LONGEST:.0f}.")
    return min(first * 2.0 ** min(restarts, 32), LONGEST)


def objection(starts: Sequence[Start], max_restarts: int) -> str | None:
    """Return why the job is not restarted.

    The message is empty if no restart is needed or was requested; None if the job is to be restarted.
    """
    last = starts[-1].ending
    if not max_restarts or not last.failed:
        return ""
    repeated = _repeated([start.ending for start in starts])
    if repeated:
        return f"hvdtrain: not restarted: {repeated}"
    if len(starts) > max_restarts:
        return f"hvdtrain: not restarted: the limit of --max-restarts {max_restarts} is reached."
    return None


def find_remaining(options: RunOptions, environ: Mapping[str, str]) -> RemainingHosts:
    """Start a trivial program on every host, in the way the ranks are started, and return the hosts that can.

    A lost host that answers again is used again. If the remaining hosts take fewer ranks than `--min-np`, all hosts
    are returned, because a lost host may be rebooting and answer by the time the ranks start.
    """
    srun = in_allocation(options, environ)
    hosts = slurm.nodes(environ) if srun else find_hosts(options, environ)
    if all_local(hosts):
        return RemainingHosts(options.ranks)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda host: _answers(host, srun, environ), hosts))
    left = tuple(host for host, answer in zip(hosts, answers, strict=True) if answer)
    lost = ", ".join(host.name for host, answer in zip(hosts, answers, strict=True) if not answer)
    if not lost:
        return RemainingHosts(options.ranks)
    fewest = options.min_np or options.ranks
    ranks = min(options.ranks, sum(host.slots for host in left))
    if ranks < fewest:
        few = f"the other hosts have slots for {ranks} ranks, fewer than {fewest} (--min-np)"
        return RemainingHosts(options.ranks, note=f"no answer from {lost}; {few}, so all are tried")
    return RemainingHosts(ranks, left, f"no answer from {lost}")


def report(starts: Sequence[Start]) -> str:
    """Return a table of all starts, as text."""
    from rich.console import Console
    from rich.table import Table

    table = Table("start", "ranks", "hosts", "how it ended", "at step", "seconds", title="All starts")
    for number, start in enumerate(starts, start=1):
        step = "" if start.ending.step is None else str(start.ending.step)
        names = list(dict.fromkeys(start.hosts))
        hosts = ", ".join(names) if len(names) < 5 else f"{len(names)} hosts"
        summary = start.ending.summary
        table.add_row(str(number), str(start.ranks), hosts, summary, step, f"{start.seconds:.0f}")
    text = io.StringIO()
    Console(file=text, width=110, markup=False, highlight=False).print(table)
    return text.getvalue().rstrip("\n")


def _repeated(endings: Sequence[Ending]) -> str:
    """Return why the last failure would occur again after a restart; empty if it may not."""
    last = endings[-1]
    if len(endings) == 1 and not last.up:
        return "no rank has started at the first attempt, so the command line or the installation is wrong."
    if last.step is None and _WRONG.search(last.summary):
        return "the script has failed before its first step with an error that a restart cannot fix."
    if last.lost or last.rank is None:
        return ""
    if last.step is not None:
        return _same_step(endings[-2:])
    if last.trace and [ending.trace for ending in endings[-_SAME_TRACES:]] == [last.trace] * _SAME_TRACES:
        return f"{_SAME_TRACES} starts have ended with the same traceback, so a restart would fail in the same way."
    return ""


def _same_step(last_two: Sequence[Ending]) -> str:
    """Return a message if the last two starts have failed in the same way at the same step, else an empty text."""
    before, last = last_two[0], last_two[-1]
    same_rank = before.rank == last.rank
    alike = same_rank or (last.trace and before.trace == last.trace)
    if len(last_two) < 2 or before.step != last.step or before.lost or not alike:
        return ""
    how = last.summary.removeprefix(f"rank {last.rank} ")
    if same_rank:
        failures = f"rank {last.rank} has failed twice"
    else:
        failures = f"ranks {before.rank} and {last.rank} have failed one after the other"
    return f"{failures} at step {last.step} ({how}): the same data or the same bug would make it fail again."


def _answers(host: Host, srun: bool, environ: Mapping[str, str]) -> bool:
    """Return whether a host can start a program."""
    start: list[str] = []
    try:
        if srun:
            start = ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={host.name}", "--overlap"]
        elif found := mpirun.find(environ):
            start = found.command(1, [Host(host.name, 1)], ())
        return run_captured([*start, "true"], environ, TIMEOUT).returncode == 0
    except LaunchError:
        return False
