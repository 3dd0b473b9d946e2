"""Read rank, size and local rank of this process from the environment that its launcher has set.

Only the environment is read here. `runtime.init()` checks that MPI agrees.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher:
    """A launcher and the environment variables in which it passes rank and size to a process.

    `only_if` names a variable that must be set too: Slurm also sets SLURM_PROCID in a batch script, but
    SLURM_STEP_ID only in processes that `srun` has started.
    """

    name: str
    rank: str
    size: str | None
    local_rank: str | None = None
    local_size: str | None = None
    only_if: str | None = None


def _named_alike(name: str, prefix: str) -> Launcher:
    return Launcher(name, *(f"{prefix}_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))


# The first row whose variables are all set wins. Slurm comes late because mpirun inside an allocation
# starts its daemons with srun, whose variables the ranks then inherit.
LAUNCHERS = (
    _named_alike("Open MPI", "OMPI_COMM_WORLD"),
    _named_alike("MVAPICH", "MV2_COMM_WORLD"),
    Launcher("PALS", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    Launcher("Intel MPI or MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    Launcher("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    Launcher(
        *("Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
        only_if="SLURM_STEP_ID",
    ),
    Launcher("PMIx", "PMIX_RANK", None),
    _named_alike("horovodrun over Gloo", "HOROVOD"),
)


@dataclass(frozen=True)
class Place:
    """Rank and size of this process; `size` and the local numbers are None if the launcher does not set them."""

    launcher: str
    rank: int
    size: int | None
    local_rank: int | None
    local_size: int | None


def detect(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Return rank and size of this process according to the first matching row of `LAUNCHERS`.

    Returns:
        The place, or None if no row matches, as after a plain `python script.py`.
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
    """Return the number of tasks of the Slurm job in which this process runs, whatever started the process.

    It is the number of tasks that were requested, or one per node; 0 outside of a Slurm job.
    """
    if "SLURM_JOB_ID" not in environ:
        return 0
    total = _number(environ, "SLURM_NTASKS") or _number(environ, "SLURM_NPROCS")
    nodes = _number(environ, "SLURM_JOB_NUM_NODES") or 1
    return total or nodes * (_number(environ, "SLURM_NTASKS_PER_NODE") or 1)


def launcher_variables() -> frozenset[str]:
    """Return the names of all variables of `LAUNCHERS`, which a new job must not inherit."""
    return frozenset(
        name
        for row in LAUNCHERS
        for name in (row.rank, row.size, row.local_rank, row.local_size, row.only_if)
        if name
    )


def _number(environ: Mapping[str, str], name: str | None) -> int | None:
    """Read a count. Slurm writes tasks per node as '2(x3),1'; None if that differs between nodes."""
    text = environ.get(name, "") if name else ""
    uniform = re.fullmatch(r"(\d+)(\(x\d+\))?", text)
    return int(uniform.group(1)) if uniform else None


def consecutive(numbers: Sequence[int]) -> list[list[int]]:
    """Divide ranks in ascending order into runs of consecutive ones."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
