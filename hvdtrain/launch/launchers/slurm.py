"""Inside a Slurm allocation: `srun` starts the ranks where it speaks the PMI that this MPI needs."""

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence

from hvdtrain import safe_path
from hvdtrain.launch.hosts import Host, LaunchError
from hvdtrain.launch.launchers.mpirun import Mpi
from hvdtrain.launch.run_program import ask

# What to try when no mpirun shows which MPI the ranks will load.
ANY_PMI = ("pmix", "pmi2")

# What srun lists it may fail to load, and what it loads may be of a version that the MPI does not understand; then
# each rank is alone, or dies. Two ranks that meet are the proof.
_MEET = safe_path.code("from mpi4py import MPI; print('met', MPI.COMM_WORLD.Get_size())")


def in_allocation(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process runs inside a Slurm allocation and can use `srun`."""
    return "SLURM_JOB_ID" in environ and shutil.which("srun", path=environ.get("PATH")) is not None


def node_count(environ: Mapping[str, str] = os.environ) -> int:
    """Return on how many nodes this process' allocation is; 1 outside of any."""
    return int(environ.get("SLURM_JOB_NUM_NODES", 1)) if in_allocation(environ) else 1


def settle(
    ranks: int, mpi: Mpi | None, environ: Mapping[str, str], python: Sequence[str] = (sys.executable,)
) -> dict[str, str]:
    """Find out once, by starting ranks, how srun and this MPI meet.

    Args:
        ranks: How many ranks there will be.
        mpi: The MPI that the ranks will load, as far as it is known.
        environ: The environment of the allocation.
        python: What runs Python for a rank, after options of srun's that it needs.

    Returns:
        What a site would write to decide it: SLURM_MPI_TYPE, or HVDTRAIN_LAUNCHER where no PMI of this srun
        brings ranks of this MPI together, so that mpirun has to; nothing where the site has decided.
    """
    if environ.get("HVDTRAIN_LAUNCHER") == "mpirun" or "SLURM_MPI_TYPE" in environ:
        return {}
    pmi = _fitting_pmi(ranks, mpi, environ, python)
    return {"SLURM_MPI_TYPE": pmi} if pmi else {"HVDTRAIN_LAUNCHER": "mpirun"}


def srun_command(
    ranks: int, bind: str, environ: Mapping[str, str], nodes: Sequence[str] = ()
) -> list[str] | None:
    """Write the `srun` part of the command line.

    Args:
        ranks: How many ranks to start.
        bind: "auto" leaves binding to the cluster's configuration.
        environ: The environment of the allocation, in which `settle` has decided.
        nodes: The nodes of the allocation to start them on, when some are lost; all if none is named.

    Returns:
        The program and its options, or None where the MPI's own mpirun has to start the ranks.
    """
    if environ.get("HVDTRAIN_LAUNCHER") == "mpirun":
        return None
    # Slurm 22.05 and later do not hand --cpus-per-task from sbatch on to srun.
    threads = environ.get("SLURM_CPUS_PER_TASK")
    binding = {"core": ["--cpu-bind=cores"], "none": ["--cpu-bind=none"]}.get(bind, [])
    # What was lost with a node may look busy to Slurm for a while.
    some = [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--overlap"] if nodes else []
    return [
        "srun",
        f"--ntasks={ranks}",
        f"--mpi={environ['SLURM_MPI_TYPE']}",
        # Without it the other ranks wait for ever for the one that failed.
        "--kill-on-bad-exit=1",
        "--export=ALL",
        *(["-c", threads] if threads else []),
        *binding,
        *(some or overlap(environ)),
    ]


def _fitting_pmi(
    ranks: int, mpi: Mpi | None, environ: Mapping[str, str], python: Sequence[str]
) -> str | None:
    offered = pmi_types(environ)
    for pmi in [name for name in (mpi.pmi if mpi else ANY_PMI) if name in offered]:
        trouble = _trouble(pmi, min(2, ranks), environ, python)
        if trouble is None:
            return pmi
        print(
            f"hvdtrain: srun --mpi={pmi} does not bring ranks together: {trouble} Another way is taken.",
            file=sys.stderr,
        )
    return None


def _trouble(pmi: str, ranks: int, environ: Mapping[str, str], python: Sequence[str]) -> str | None:
    """Start a world of two and returns what went wrong, or None if they met."""
    command = ["srun", f"--ntasks={ranks}", f"--mpi={pmi}", "--kill-on-bad-exit=1", *overlap(environ)]
    try:
        done = ask([*command, *python, *_MEET], environ, 120)
    except LaunchError as error:
        return str(error)
    if f"met {ranks}" in done.stdout:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[0][:300] if lines else f"{ranks} ranks did not find each other."


def overlap(environ: Mapping[str, str]) -> list[str]:
    """Return the option without which no step starts inside another, an interactive shell for one."""
    return ["--overlap"] if "SLURM_STEP_ID" in environ else []


def first_hosts(environ: Mapping[str, str]) -> Sequence[str]:
    """Return the first host of the allocation, towards which this host's address can be looked up."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", environ.get("SLURM_JOB_NODELIST", ""))
    return ["".join(part or "" for part in match.groups())] if match else []


def pmi_types(environ: Mapping[str, str]) -> set[str]:
    """Ask `srun` which PMI types it speaks."""
    try:
        done = ask(["srun", "--mpi=list"], environ, 60)
    except LaunchError:
        return set()
    return set(re.findall(r"[\w.]+", done.stdout + done.stderr))


def nodes(environ: Mapping[str, str]) -> tuple[Host, ...]:
    """List the nodes of the allocation, with the tasks that each of them takes.

    Raises:
        LaunchError: If Slurm cannot say.
    """
    done = ask(["scontrol", "show", "hostnames", environ.get("SLURM_JOB_NODELIST", "")], environ, 60)
    names = done.stdout.split()
    # "2(x3),1" is two tasks on each of three nodes, and one on the last.
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_TASKS_PER_NODE", ""))
    tasks = [int(number) for number, times in counts for _ in range(int(times or 1))]
    if not names or len(names) != len(tasks):
        raise LaunchError(
            f"Slurm says that this job has the nodes {names} and {tasks} tasks on them (SLURM_JOB_NODELIST, "
            "SLURM_TASKS_PER_NODE): expected a number of tasks for each node."
        )
    return tuple(map(Host, names, tasks))
