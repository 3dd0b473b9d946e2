"""`--max-restarts`: whether ranks that failed are started again, after how long, and the story of all starts."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.restarts.outcome import Ending

# The number of this start for the ranks, from 0.
RESTART = "HVDTRAIN_RESTART"
# Seconds before the first restart; the pause doubles with each.
BACKOFF = "HVDTRAIN_BACKOFF"
LONGEST = 60.0

# What no other start will mend: a usage message of argparse's, a script that Python cannot read or load.
_WRONG = re.compile(
    r"failed: (it called sys\.exit\(2\)|(Syntax|Indentation|Tab|ModuleNotFound|Import)Error\b)"
)

# How often the same traceback may end a training of which no step is known. A network or a disk may fail twice.
_SAME_TRACES = 3


@dataclass(frozen=True)
class Start:
    """One start of the ranks, and what became of it.

    Args:
        ranks: How many were started.
        hosts: Where those came to life that did, one entry a rank.
        seconds: How long it took.
        ending: How it ended.
    """

    ranks: int
    hosts: Sequence[str]
    seconds: float
    ending: Ending


def pause(environ: Mapping[str, str], restarts: int) -> float:
    """Return the seconds to wait before a restart: 1, 2, 4, … and 60 at most.

    Args:
        environ: Where HVDTRAIN_BACKOFF may name other seconds for the first.
        restarts: How many restarts there have been.

    Raises:
        LaunchError: If HVDTRAIN_BACKOFF is no number of seconds.
    """
    try:
        first = float(environ.get(BACKOFF, 1))
    except ValueError:
        first = -1
    if not 0 <= first <= LONGEST:
        raise LaunchError(f"{BACKOFF} is {environ[BACKOFF]!r}; expected seconds from 0 to {LONGEST:.0f}.")
    return min(first * 2.0 ** min(restarts, 32), LONGEST)


def objection(starts: Sequence[Start], max_restarts: int) -> str | None:
    """Say why the ranks are not started again.

    Args:
        starts: All starts so far.
        max_restarts: How many restarts were asked for.

    Returns:
        A sentence, empty where there is nothing to say; None if they are to be started again.
    """
    last = starts[-1].ending
    if not max_restarts or not last.failed:
        return ""
    repeated = _repeated([start.ending for start in starts])
    if repeated:
        return f"hvdtrain: not started again: {repeated}"
    if len(starts) > max_restarts:
        return f"hvdtrain: not started again: --max-restarts {max_restarts} is used up."
    return None


def _repeated(endings: Sequence[Ending]) -> str:
    """Find what another start will not mend."""
    last = endings[-1]
    if len(endings) == 1 and not last.up:
        return "no rank came to life at the first start, so what was typed or installed is wrong."
    if last.step is None and _WRONG.search(last.summary):
        return "the script was wrong before its first step, and would be again."
    if last.lost or last.rank is None:
        return ""
    if last.step is not None:
        return _same_step(endings[-2:])
    if last.trace and [ending.trace for ending in endings[-_SAME_TRACES:]] == [last.trace] * _SAME_TRACES:
        return f"{_SAME_TRACES} starts have ended with the same traceback: the same bug will do it again."
    return ""


def _same_step(two: Sequence[Ending]) -> str:
    before, last = two[0], two[-1]
    alike = before.rank == last.rank or (last.trace and before.trace == last.trace)
    if len(two) < 2 or before.step != last.step or before.lost or not alike:
        return ""
    who = f"rank {last.rank} has" if before.rank == last.rank else f"ranks {before.rank} and {last.rank} have"
    how = last.summary.removeprefix(f"rank {last.rank} ")
    times = "twice" if before.rank == last.rank else "one after the other"
    return f"{who} died {times} at step {last.step} ({how}): the same data or the same bug will do it again."


def report(starts: Sequence[Start]) -> str:
    """Return what happened in each start, as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("start", "ranks", "hosts", "how it ended", "at step", "seconds", title="All starts")
    for number, start in enumerate(starts, start=1):
        step = "" if start.ending.step is None else str(start.ending.step)
        names = list(dict.fromkeys(start.hosts))
        hosts = ", ".join(names) if len(names) < 5 else f"{len(names)} hosts"
        summary = start.ending.summary
        table.add_row(str(number), str(start.ranks), hosts, summary, step, f"{start.seconds:.0f}")
    drawn = io.StringIO()
    Console(file=drawn, width=110, markup=False, highlight=False).print(table)
    return drawn.getvalue().rstrip("\n")
