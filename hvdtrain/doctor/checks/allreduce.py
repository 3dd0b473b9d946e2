"""Check that an allreduce over two ranks gives the right sum, on each engine."""

from typing import Any

from hvdtrain.doctor.checks.horovod import BUILD, Horovod
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.probe_runner import ProbeError, ProbeRunner

RANKS = 2
EXPECTED = 3.0  # rank 0 gives 1, rank 1 gives 2


def allreduce(probes: ProbeRunner, engine: str, horovod: Horovod | None = None) -> Finding:
    """Check an allreduce of two ranks; with Horovod's engine only if Horovod is built for TensorFlow.

    Args:
        probes: The results of the probes.
        engine: `mpi` or `horovod`.
        horovod: The installed Horovod; used for the engine `horovod` only.
    """
    name = f"Allreduce, {engine}"
    if engine == "horovod" and not (horovod and horovod.tensorflow):
        return note(name, "Not tried: there is no Horovod for TensorFlow here.", BUILD)
    if not probes.launch_command(RANKS):
        return note(name, "Not tried: there is no launcher here.")
    try:
        return judge_allreduce(engine, probes.allreduce(engine))
    except ProbeError as error:
        return wrong(name, f"Two ranks did not finish an allreduce: {error}.", fix_for(engine))


def judge_allreduce(engine: str, seen: dict[str, Any]) -> Finding:
    """Judge the result on rank 0: the number of ranks, the lowest and the highest element of the sum."""
    name = f"Allreduce, {engine}"
    if seen["size"] != RANKS:
        found = (
            f"{RANKS} ranks were started, but each found a world of {seen['size']}: the MPIs do not match."
        )
        return wrong(name, found, fix_for(engine))
    if not seen["lowest"] == seen["highest"] == EXPECTED:
        found = (
            f"Two ranks gave 1 and 2; the sum is between {seen['lowest']} and {seen['highest']}, expected 3."
        )
        return wrong(name, found, fix_for(engine))
    return ok(name, f"{RANKS} ranks summed 4 MiB and the sum is right")


def fix_for(engine: str) -> str:
    """Return what to type if an allreduce over an engine fails."""
    if engine == "horovod":
        return f"{BUILD}   # once the rows above are right; meanwhile: export HVDTRAIN_ENGINE=mpi"
    return "hvdtrain doctor   # again, once the rows above name the same MPI"
