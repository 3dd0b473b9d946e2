"""Inside a Slurm allocation: `srun` starts the ranks where it speaks the PMI that this MPI needs."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

from hvdtrain.launch.mpirun import Mpi

# What to try when no mpirun shows which MPI the ranks will load.
ANY_PMI = ("pmix", "pmi2")

# What srun lists it may fail to load, and what it loads may be of a version that the MPI does not understand; then
# each rank is alone, or dies. Two ranks that meet are the proof.
_MEET = "from mpi4py import MPI; print('met', MPI.COMM_WORLD.Get_size())"


def in_allocation(environ: Mapping[str, str] = os.environ) -> bool:
    """Says whether this process runs inside a Slurm allocation and can use `srun`."""
    return "SLURM_JOB_ID" in environ and shutil.which("srun", path=environ.get("PATH")) is not None


def srun_command(ranks: int, mpi: Mpi | None, bind: str, environ: Mapping[str, str]) -> list[str] | None:
    """Writes the `srun` part of the command line.

    Args:
        ranks: How many ranks to start.
        mpi: The MPI that the ranks will load, as far as it is known.
        bind: "auto" leaves binding to the cluster's configuration.
        environ: The environment of the allocation.

    Returns:
        The program and its options, or None where no PMI of this srun brings ranks of this MPI together, or
        HVDTRAIN_LAUNCHER is mpirun; the MPI's own mpirun can then start the ranks inside the allocation.
    """
    pmi = None if environ.get("HVDTRAIN_LAUNCHER") == "mpirun" else _fitting_pmi(ranks, mpi, environ)
    if pmi is None:
        return None
    # Slurm 22.05 and later do not hand --cpus-per-task from sbatch on to srun.
    threads = environ.get("SLURM_CPUS_PER_TASK")
    binding = {"core": ["--cpu-bind=cores"], "none": ["--cpu-bind=none"]}.get(bind, [])
    return [
        "srun",
        f"--ntasks={ranks}",
        f"--mpi={pmi}",
        # Without it the other ranks wait for ever for the one that failed.
        "--kill-on-bad-exit=1",
        "--export=ALL",
        *(["-c", threads] if threads else []),
        *binding,
        *overlap(environ),
    ]


def _fitting_pmi(ranks: int, mpi: Mpi | None, environ: Mapping[str, str]) -> str | None:
    """Finds the PMI by which srun and this MPI really meet; SLURM_MPI_TYPE is a site's own word for it."""
    if "SLURM_MPI_TYPE" in environ:
        return environ["SLURM_MPI_TYPE"]
    offered = pmi_types(environ)
    for pmi in [name for name in (mpi.pmi if mpi else ANY_PMI) if name in offered]:
        trouble = _trouble(pmi, min(2, ranks), environ)
        if trouble is None:
            return pmi
        print(
            f"hvdtrain: srun --mpi={pmi} does not bring ranks together: {trouble} Another way is taken.",
            file=sys.stderr,
        )
    return None


def _trouble(pmi: str, ranks: int, environ: Mapping[str, str]) -> str | None:
    """Starts a world of two and returns what went wrong, or None if they met."""
    command = ["srun", f"--ntasks={ranks}", f"--mpi={pmi}", "--kill-on-bad-exit=1", *overlap(environ)]
    try:
        done = subprocess.run(
            [*command, sys.executable, "-c", _MEET],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if f"met {ranks}" in done.stdout:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[0][:300] if lines else f"{ranks} ranks did not find each other."


def overlap(environ: Mapping[str, str]) -> list[str]:
    """Gives the option without which no step starts inside another, an interactive shell for one."""
    return ["--overlap"] if "SLURM_STEP_ID" in environ else []


def first_hosts(environ: Mapping[str, str]) -> Sequence[str]:
    """Names the first host of the allocation, towards which this host's address can be looked up."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", environ.get("SLURM_JOB_NODELIST", ""))
    return ["".join(part or "" for part in match.groups())] if match else []


def pmi_types(environ: Mapping[str, str]) -> set[str]:
    """Asks `srun` which PMI types it speaks."""
    try:
        done = subprocess.run(
            ["srun", "--mpi=list"],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return set(re.findall(r"[\w.]+", done.stdout + done.stderr))
