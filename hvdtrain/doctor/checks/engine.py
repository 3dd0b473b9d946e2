"""Check which engine a training started here would use, and why."""

from hvdtrain import settings
from hvdtrain.collectives.horovod.engine import reason_not_to_use
from hvdtrain.collectives.mpi.library import mpi_name
from hvdtrain.doctor.checks.horovod import BUILD
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.probe_runner import ProbeError, ProbeRunner
from hvdtrain.runtime import CHOICES

NAME = "Engine"


def engine(probes: ProbeRunner) -> Finding:
    """Return the engine that `HVDTRAIN_ENGINE` selects, or the one used if it is not set."""
    chosen = settings.get("HVDTRAIN_ENGINE", probes.environ).lower()
    try:
        reason = reason_not_to_use(probes.stack["tensorflow"], mpi_name(probes.mpi["library"]))
    except (ProbeError, KeyError):
        reason = "TensorFlow or MPI is missing"
    return judge_engine(chosen, reason)


def judge_engine(chosen: str, reason: str | None) -> Finding:
    """Judge the selected engine.

    Args:
        chosen: The value of HVDTRAIN_ENGINE, or "auto".
        reason: Why Horovod cannot be used here; None if it can.
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
    if chosen == "auto":
        return ok(NAME, "horovod, built for this TensorFlow and MPI")
    return ok(NAME, f"{chosen}, as you chose")
