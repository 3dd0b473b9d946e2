"""The proof: two ranks really sum numbers over each engine."""

from typing import Any

from hvdtrain.doctor.checks.horovod import BUILD, Horovod
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.inquiry import Inquiry, NoAnswerError

RANKS = 2
EXPECTED = 3.0  # rank 0 gives 1, rank 1 gives 2


def allreduce(inquiry: Inquiry, engine: str, horovod: Horovod | None = None) -> Finding:
    """Lets two ranks sum over an engine; Horovod's only where there is a Horovod for TensorFlow.

    Args:
        inquiry: What starts the ranks.
        engine: `mpi` or `horovod`.
        horovod: The Horovod that is installed, when its engine is asked for.
    """
    name = f"Allreduce, {engine}"
    if engine == "horovod" and not (horovod and horovod.tensorflow):
        return note(name, "Not tried: there is no Horovod for TensorFlow here.", BUILD)
    if not inquiry.start_of_ranks(RANKS):
        return note(name, "Not tried: nothing here starts ranks.")
    try:
        return judge_allreduce(engine, inquiry.allreduce(engine))
    except NoAnswerError as why:
        return wrong(name, f"Two ranks did not finish a sum: {why}.", mend(engine))


def judge_allreduce(engine: str, seen: dict[str, Any]) -> Finding:
    """Judges what rank 0 saw of the sum: the number of ranks, its lowest and its highest element."""
    name = f"Allreduce, {engine}"
    if seen["size"] != RANKS:
        found = f"{RANKS} ranks were started, but each saw a world of {seen['size']}: the MPIs do not match."
        return wrong(name, found, mend(engine))
    if not seen["lowest"] == seen["highest"] == EXPECTED:
        found = f"Two ranks gave 1 and 2; the sum came back between {seen['lowest']} and {seen['highest']}."
        return wrong(name, found, mend(engine))
    return ok(name, f"{RANKS} ranks summed 4 MiB and the sum is right")


def mend(engine: str) -> str:
    """Says what to type when an engine does not sum."""
    if engine == "horovod":
        return f"{BUILD}   # once the rows above are right; meanwhile: export HVDTRAIN_ENGINE=mpi"
    return "hvdtrain doctor   # again, when the rows above agree on one MPI"
