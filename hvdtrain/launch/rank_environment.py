"""Prepare what the ranks find when they start: data on their local disks, and when they must stop."""

import contextlib
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from hvdtrain import settings
from hvdtrain.launch.hosts import LaunchError, run_captured
from hvdtrain.launch.launchers import slurm

# A time in seconds since 1970, before which the ranks write a checkpoint and stop.
DEADLINE = "HVDTRAIN_DEADLINE"

_FORMS = (
    re.compile(r"(?P<seconds>\d+(\.\d+)?)"),
    re.compile(r"((?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)"),
    re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?"),
)
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_YEAR = 365 * 86400  # the time limit that Slurm reports for a job without a limit


def data_variable(source: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return HVDTRAIN_DATA, the variable that tells the script where its data will be.

    Outside a Slurm allocation nothing is copied: the script reads the folder or file of --stage itself.
    """
    if source is None:
        return {}
    if not Path(source).exists():
        raise LaunchError(f"--stage {source} is not there (looked for from {Path.cwd()}).")
    copied = slurm.in_allocation(environ)
    return {"HVDTRAIN_DATA": str(_target(source, environ) if copied else Path(source).absolute())}


@contextlib.contextmanager
def staged(source: str | None, environ: Mapping[str, str]) -> Iterator[None]:
    """Copy `source` to every node of the Slurm allocation, and remove the copies at the end of the block."""
    if source is None or not slurm.in_allocation(environ):
        yield
        return
    target = _target(source, environ)
    folder, original, copy = (shlex.quote(str(path)) for path in (target.parent, source, target))
    try:
        _on_each_node(f"mkdir -p {folder} && cp -RL {original} {copy}", environ, None)
        yield
    finally:
        with contextlib.suppress(LaunchError):
            _on_each_node(f"rm -rf {folder}", environ, 60)


def deadline_variable(walltime: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return HVDTRAIN_DEADLINE, the variable that tells the ranks when they must have stopped, if there is a limit.

    It is the earliest of the end of --walltime, the end of the Slurm job, and a deadline set by the user.
    """
    ends = [_set_by_user(environ), slurm_end(environ)]
    ends += [time.time() + seconds(walltime)] if walltime is not None else []
    known = [end for end in ends if end is not None]
    return {DEADLINE: f"{min(known):.3f}"} if known else {}


def seconds(walltime: str) -> float:
    """Read a time as Slurm writes it: seconds, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    A single number means minutes for Slurm, but seconds here.
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


def slurm_end(environ: Mapping[str, str]) -> float | None:
    """Return when Slurm will end this job, in seconds since 1970; None outside of a job or without a time limit."""
    if not slurm.in_allocation(environ):
        return None
    end = environ.get("SLURM_JOB_END_TIME", "")
    known = float(end) if end.isdigit() else _ask_squeue(environ)
    return known if known and known < time.time() + _YEAR - 86400 else None


def _ask_squeue(environ: Mapping[str, str]) -> float | None:
    """Ask squeue for the end of the job, which only newer versions of Slurm set in SLURM_JOB_END_TIME."""
    try:
        done = run_captured(["squeue", "-h", "-j", environ["SLURM_JOB_ID"], "-o", "%e"], environ, 60)
        return datetime.fromisoformat(done.stdout.strip()).timestamp()
    except (LaunchError, ValueError):
        return None


def _set_by_user(environ: Mapping[str, str]) -> float | None:
    text = settings.get(DEADLINE, environ)
    try:
        return float(text) if text else None
    except ValueError as error:
        raise LaunchError(
            f"{DEADLINE} is {text!r}; expected seconds since 1970, as `date +%s` writes them."
        ) from error


def _target(source: str, environ: Mapping[str, str]) -> Path:
    """Return the path of the copy, in a folder of this job on the local disk that the site provides for jobs."""
    disk = environ.get("SLURM_TMPDIR") or environ.get("TMPDIR") or "/tmp"
    return Path(disk) / f"hvdtrain-{environ['SLURM_JOB_ID']}" / Path(source).resolve().name


def _on_each_node(command: str, environ: Mapping[str, str], limit: float | None) -> None:
    nodes = environ.get("SLURM_JOB_NUM_NODES", "1")
    step = ["srun", f"--ntasks={nodes}", "--ntasks-per-node=1", *slurm.overlap(environ)]
    done = run_captured([*step, "sh", "-c", command], environ, limit)
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise LaunchError(f"--stage: not every node could copy the data ({command}): {reason}")
