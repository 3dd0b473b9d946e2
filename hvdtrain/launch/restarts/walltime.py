"""When the training has to have stopped: `--walltime`, or the end of the Slurm job, whichever comes first."""

import os
import re
import time
from collections.abc import Mapping
from datetime import datetime

from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.launchers import slurm
from hvdtrain.launch.run_program import ask

# Seconds since 1970: the ranks write a checkpoint and stop before.
DEADLINE = "HVDTRAIN_DEADLINE"

_FORMS = (
    re.compile(r"(?P<seconds>\d+(\.\d+)?)"),
    re.compile(r"((?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)"),
    re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?"),
)
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_YEAR = 365 * 86400  # what Slurm takes a job without a limit to last


def told(walltime: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what tells the ranks when their time is up: HVDTRAIN_DEADLINE.

    Args:
        walltime: What was typed after --walltime, if anything.
        environ: The environment, also that of a Slurm job, and with a deadline that was set by hand.

    Returns:
        The variable; nothing where the time has no end.

    Raises:
        LaunchError: If what was typed is no time.
    """
    ends = [_set_by_hand(environ), slurm_end(environ)]
    ends += [time.time() + seconds(walltime)] if walltime is not None else []
    known = [end for end in ends if end is not None]
    return {DEADLINE: f"{min(known):.3f}"} if known else {}


def seconds(walltime: str) -> float:
    """Read a time as Slurm writes it: seconds, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Slurm takes a single number for minutes; here, where no clock is drawn, it is seconds.

    Raises:
        LaunchError: If it is no time, or none at all.
    """
    matches = [match for form in _FORMS if (match := form.fullmatch(walltime.strip()))]
    parts = matches[0].groupdict() if matches else {}
    total = sum(float(number or 0) * _SECONDS[unit] for unit, number in parts.items())
    if not total:
        raise LaunchError(
            f"--walltime {walltime} is no length of time: write seconds, minutes:seconds, hours:minutes:seconds "
            "or days-hours:minutes:seconds, as in 8:00:00."
        )
    return total


def slurm_end(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return when Slurm will end this job, in seconds since 1970; None outside of one, or if it has no limit."""
    if not slurm.in_allocation(environ):
        return None
    end = environ.get("SLURM_JOB_END_TIME", "")
    known = float(end) if end.isdigit() else _ask_squeue(environ)
    return known if known and known < time.time() + _YEAR - 86400 else None


def _ask_squeue(environ: Mapping[str, str]) -> float | None:
    """Ask for what a newer Slurm says in SLURM_JOB_END_TIME."""
    try:
        done = ask(["squeue", "-h", "-j", environ["SLURM_JOB_ID"], "-o", "%e"], environ, 60)
        return datetime.fromisoformat(done.stdout.strip()).timestamp()
    except (LaunchError, ValueError):
        return None


def _set_by_hand(environ: Mapping[str, str]) -> float | None:
    try:
        return float(environ[DEADLINE])
    except KeyError:
        return None
    except ValueError as error:
        raise LaunchError(
            f"{DEADLINE} is {environ[DEADLINE]!r}; expected seconds since 1970, as `date +%s` writes them."
        ) from error
