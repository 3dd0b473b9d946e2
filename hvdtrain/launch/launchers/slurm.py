"""Start ranks with `srun` inside a Slurm allocation, if it offers a PMI that works with this MPI."""

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence

from hvdtrain import safe_path, settings
from hvdtrain.launch.hosts import Host, LaunchError, run_captured
from hvdtrain.launch.launchers.mpirun import Mpi

# The PMI types to try if there is no mpirun that shows which MPI the ranks will load.
ANY_PMI = ("pmix", "pmi2")

# srun may fail to load a PMI that it lists, or load a version that the MPI does not support; then each rank has
# size 1 or fails. So two ranks are started as a test, which must see each other.
_MEET = safe_path.code("from mpi4py import MPI; print('met', MPI.COMM_WORLD.Get_size())")


def in_allocation(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process runs inside a Slurm allocation and can use `srun`."""
    return "SLURM_JOB_ID" in environ and shutil.which("srun", path=environ.get("PATH")) is not None


def node_count(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of nodes of the Slurm allocation; 1 outside of an allocation."""
    return int(environ.get("SLURM_JOB_NUM_NODES", 1)) if in_allocation(environ) else 1


def settle(
    ranks: int, mpi: Mpi | None, environ: Mapping[str, str], python: Sequence[str] = (sys.executable,)
) -> dict[str, str]:
    """Test by starting two ranks which PMI of srun works with this MPI.

    Args:
        ranks: The number of ranks of the job.
        mpi: The MPI that the ranks will load, or None if it is not known.
        environ: The environment of the allocation.
        python: The options of srun that Python needs, and the command that runs Python for a rank.

    Returns:
        The variable with the result: SLURM_MPI_TYPE, or HVDTRAIN_LAUNCHER=mpirun if no PMI of this srun works
        with this MPI; empty if the environment sets one of them already.
    """
    if settings.get("HVDTRAIN_LAUNCHER", environ) == "mpirun" or "SLURM_MPI_TYPE" in environ:
        return {}
    offered = pmi_types(environ)
    for pmi in mpi.pmi if mpi else ANY_PMI:
        if pmi not in offered:
            continue
        trouble = _trouble(pmi, min(2, ranks), environ, python)
        if trouble is None:
            return {"SLURM_MPI_TYPE": pmi}
        fails = f"srun --mpi={pmi} does not connect the ranks: {trouble}"
        print(f"hvdtrain: {fails} Trying another PMI or mpirun.", file=sys.stderr)
    return {"HVDTRAIN_LAUNCHER": "mpirun"}


def srun_command(
    ranks: int, bind: str, environ: Mapping[str, str], nodes: Sequence[str] = ()
) -> list[str] | None:
    """Return the `srun` part of the command line.

    Args:
        ranks: The number of ranks to start.
        bind: "auto" uses the binding that the cluster has configured.
        environ: The environment of the allocation, with the variable that `settle` has returned.
        nodes: The nodes to start the ranks on, if some nodes are lost; empty for all nodes of the allocation.

    Returns:
        The program and its options, or None if the MPI's own mpirun must start the ranks.
    """
    if settings.get("HVDTRAIN_LAUNCHER", environ) == "mpirun":
        return None
    # Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch.
    threads = ["-c", environ["SLURM_CPUS_PER_TASK"]] if environ.get("SLURM_CPUS_PER_TASK") else []
    binding = {"core": ["--cpu-bind=cores"], "none": ["--cpu-bind=none"]}.get(bind, [])
    # After a node was lost, Slurm may consider the resources of its job step busy for a while: hence --overlap.
    remaining = [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--overlap"] if nodes else []
    return [
        "srun",
        f"--ntasks={ranks}",
        f"--mpi={environ['SLURM_MPI_TYPE']}",
        # Without it the other ranks wait forever for a rank that has failed.
        "--kill-on-bad-exit=1",
        "--export=ALL",
        *threads,
        *binding,
        *(remaining or overlap(environ)),
    ]


def _trouble(pmi: str, ranks: int, environ: Mapping[str, str], python: Sequence[str]) -> str | None:
    """Start at most two ranks and return what went wrong, or None if they have seen each other."""
    command = ["srun", f"--ntasks={ranks}", f"--mpi={pmi}", "--kill-on-bad-exit=1", *overlap(environ)]
    try:
        done = run_captured([*command, *python, *_MEET], environ, 120)
    except LaunchError as error:
        return str(error)
    if f"met {ranks}" in done.stdout:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[0][:300] if lines else f"{ranks} ranks did not find each other."


def overlap(environ: Mapping[str, str]) -> list[str]:
    """Return --overlap inside a job step, such as an interactive shell; without it no further step would start."""
    return ["--overlap"] if "SLURM_STEP_ID" in environ else []


def first_hosts(environ: Mapping[str, str]) -> Sequence[str]:
    """Return the first host of the allocation, which is used to find this host's address on the route to it."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", environ.get("SLURM_JOB_NODELIST", ""))
    return ["".join(part or "" for part in match.groups())] if match else []


def pmi_types(environ: Mapping[str, str]) -> set[str]:
    """Return the PMI types that `srun` offers."""
    try:
        done = run_captured(["srun", "--mpi=list"], environ, 60)
    except LaunchError:
        return set()
    return set(re.findall(r"[\w.]+", done.stdout + done.stderr))


def nodes(environ: Mapping[str, str]) -> tuple[Host, ...]:
    """Return the nodes of the allocation with the number of tasks of each."""
    done = run_captured(["scontrol", "show", "hostnames", environ.get("SLURM_JOB_NODELIST", "")], environ, 60)
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
