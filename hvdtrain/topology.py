"""Who am I: what the environment says about this process's place among those started with it.

Only the environment is read here. Whether MPI agrees is asked in `runtime.init()`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher:
    """One launcher and the environment variables through which it tells a process its place.

    `only_if` names a variable without which the others mean nothing: Slurm sets SLURM_PROCID in a
    batch script too, but SLURM_STEP_ID only in what `srun` started.
    """

    name: str
    rank: str
    size: str | None
    local_rank: str | None = None
    local_size: str | None = None
    only_if: str | None = None


# The first row whose variables are all set wins. Slurm comes late because mpirun inside an allocation
# starts its daemons with srun, whose variables the ranks then inherit.
LAUNCHERS = (
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("PALS", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    Launcher("Intel MPI or MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    Launcher("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    Launcher(
        "Slurm",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        only_if="SLURM_STEP_ID",
    ),
    Launcher("PMIx", "PMIX_RANK", None),
    Launcher(
        "horovodrun over Gloo", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"
    ),
)


@dataclass(frozen=True)
class Place:
    """What a launcher told this process; `size` and the local numbers are None where it does not say."""

    launcher: str
    rank: int
    size: int | None
    local_rank: int | None
    local_size: int | None


def detect(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Tells whether this process was started as one of several, and which one.

    Args:
        environ: The environment to read; the process's own by default.

    Returns:
        The place that the first matching row of `LAUNCHERS` names, or None when no launcher left a
        trace, as after a plain `python script.py`.
    """
    for launcher in LAUNCHERS:
        needed = (launcher.rank, launcher.size, launcher.only_if)
        if all(name in environ for name in needed if name):
            return Place(
                launcher.name,
                int(environ[launcher.rank]),
                _number(environ, launcher.size),
                _number(environ, launcher.local_rank),
                _number(environ, launcher.local_size),
            )
    return None


def slurm_tasks(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many tasks the Slurm job around this process has, whatever started the process.

    Args:
        environ: The environment to read; the process's own by default.

    Returns:
        The number of tasks that were asked for, or at least one a node; 0 outside of a Slurm job.
    """
    if "SLURM_JOB_ID" not in environ:
        return 0
    total = _number(environ, "SLURM_NTASKS") or _number(environ, "SLURM_NPROCS")
    nodes = _number(environ, "SLURM_JOB_NUM_NODES") or 1
    return total or nodes * (_number(environ, "SLURM_NTASKS_PER_NODE") or 1)


def launcher_variables() -> frozenset[str]:
    """Names every variable of `LAUNCHERS`: what a process started afresh must not inherit."""
    return frozenset(
        name
        for row in LAUNCHERS
        for name in (row.rank, row.size, row.local_rank, row.local_size, row.only_if)
        if name
    )


def _number(environ: Mapping[str, str], name: str | None) -> int | None:
    """Reads a count; Slurm writes tasks a node as '2(x3),1', which is one number only where it is uniform."""
    text = environ.get(name, "") if name else ""
    uniform = re.fullmatch(r"(\d+)(\(x\d+\))?", text)
    return int(uniform.group(1)) if uniform else None
