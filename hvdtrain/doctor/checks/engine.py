"""Which engine a training started here would take, and why."""

from hvdtrain.collectives.horovod.engine import reason_not_to_use
from hvdtrain.collectives.mpi.library import mpi_name
from hvdtrain.doctor.checks.horovod import BUILD
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.inquiry import Inquiry, NoAnswerError
from hvdtrain.runtime import CHOICES

NAME = "Engine"


def engine(inquiry: Inquiry) -> Finding:
    """Says what `HVDTRAIN_ENGINE`, or its absence, leads to."""
    chosen = inquiry.environ.get("HVDTRAIN_ENGINE", "").lower() or "auto"
    try:
        reason = reason_not_to_use(inquiry.stack["tensorflow"], mpi_name(inquiry.mpi["library"]))
    except (NoAnswerError, KeyError):
        reason = "TensorFlow or MPI is missing"
    return judge_engine(chosen, reason)


def judge_engine(chosen: str, reason: str | None) -> Finding:
    """Judges the user's choice.

    Args:
        chosen: The value of HVDTRAIN_ENGINE.
        reason: Why Horovod cannot serve here; None where it can.
    """
    if chosen not in CHOICES:
        found = f"HVDTRAIN_ENGINE={chosen!r} is none of {', '.join(CHOICES)}."
        return wrong(NAME, found, "unset HVDTRAIN_ENGINE")
    if chosen == "single":
        return note(NAME, "HVDTRAIN_ENGINE=single: no ranks, one process only.", "unset HVDTRAIN_ENGINE")
    if chosen == "horovod" and reason:
        return wrong(
            NAME, f"HVDTRAIN_ENGINE=horovod, but {reason}.", f"{BUILD}   # or: unset HVDTRAIN_ENGINE"
        )
    if chosen == "auto" and reason:
        return ok(NAME, f"mpi, because {reason}")
    return ok(
        NAME, "horovod, built for this TensorFlow and MPI" if chosen == "auto" else f"{chosen}, as you chose"
    )
