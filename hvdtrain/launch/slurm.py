"""Inside a Slurm allocation: `srun` starts the ranks where it speaks the PMI that this MPI needs."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from hvdtrain.launch.mpirun import Mpi

# What to try when no mpirun shows which MPI the ranks will load.
ANY_PMI = ("pmix", "pmi2")


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
        The program and its options, or None where this srun speaks no PMI that the MPI understands;
        the MPI's own mpirun can then start the ranks inside the allocation.
    """
    offered = pmi_types(environ)
    pmi = next((name for name in (mpi.pmi if mpi else ANY_PMI) if name in offered), None)
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
        # Inside another step, an interactive shell for one, only an overlapping step can start.
        *(["--overlap"] if "SLURM_STEP_ID" in environ else []),
    ]


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
