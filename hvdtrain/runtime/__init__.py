"""The one mutable global: which engine is in use, and the proof that its world is the one launched."""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from hvdtrain import heartbeat, settings, topology
from hvdtrain.collectives.agreement import Known, known, mark
from hvdtrain.collectives.engine import Call, Engine, MismatchError
from hvdtrain.collectives.single import SingleEngine
from hvdtrain.messages import logger
from hvdtrain.runtime import self_watch

CHOICES = ("auto", "horovod", "mpi", "single")

# What a rank waits for that only reports another one's failure: to be ended by that rank, which shows its error.
_LEAVES = Call("the end of a rank that cannot go on, because another one has failed", farewell=True)
# What a rank waits for at its end: another that is still training is told so, instead of waiting for ever.
_END = Call("end of the script")


_engine: Engine | None = None
_checks: list[Callable[[Engine], None]] = []
_checked = False
# Of each process set by its number: its ranks, and its engine or None where this rank is no member.
engines_of_sets: dict[int, tuple[tuple[int, ...], Engine | None]] = {}


def init(comm: Any = None) -> Engine:
    """Join this process to the world it was launched in. Calling it again changes nothing.

    `HVDTRAIN_ENGINE` chooses the engine: `auto` (default) takes Horovod where it is built for exactly this
    TensorFlow and MPI, else mpi, and `single` in a process that no launcher started.

    Args:
        comm: The world, if it is not all that was launched: an mpi4py communicator, or ranks of MPI's world.

    Returns:
        The engine in use.

    Raises:
        RuntimeError: On every rank, if the launcher started another number of processes than MPI sees: each
            would train alone and believe it is all there is.
        ValueError: If HVDTRAIN_ENGINE is not one of its four values.
    """
    global _engine, _checked
    if _engine is None:
        choice = settings.get("HVDTRAIN_ENGINE").lower()
        if choice not in CHOICES:
            raise ValueError(f"HVDTRAIN_ENGINE must be one of {', '.join(CHOICES)}. Received: {choice!r}.")
        place = topology.detect()
        with heartbeat.Waiting(b"in hvd.init()"):
            engine = _open(choice, place, comm)
        _check_world(engine, None if comm else place)
        if engine.size == 1 and choice != "single":
            _tell_if_alone_in_a_job(place)
        _end_all_on_error(engine)
        atexit.register(_end_together, engine)
        self_watch.start(engine)
        _engine, _checked = engine, False
    return _engine


def shutdown() -> None:
    """Leave the world, when all ranks do; what needs it raises afterwards, until `init()` is called again.

    Raises:
        MismatchError: On every rank, if some ranks are still at work.
    """
    global _engine
    if _engine is not None:
        engine, _engine = _engine, None
        engine.agree(_END)
        _check(engine)
        if engine.timeline is not None:
            engine.timeline.close()
        parts = _engines_of_sets()
        engines_of_sets.clear()
        for each in (*parts, engine):
            each.closed = True
            each.shutdown()


def before_end(check: Callable[[Engine], None]) -> None:
    """Let a function compare the ranks when all of them have come to their end.

    Args:
        check: Takes the world's engine, and is called on all ranks. What it raises ends the job.
    """
    _checks.append(check)


def finish() -> None:
    """Wait for all ranks at the end of the script, and compare them while an error can still be reported.

    Raises:
        MismatchError: On every rank, if some ranks are still at work, or a check finds that the ranks differ.
    """
    if _engine is not None:
        try:
            _engine.agree(_END)
        except MismatchError as error:
            # The ranks that are still at work show where; this one has no more to say.
            raise mark(error, Known.REPORTED) from None
        _check(_engine)


def _check(engine: Engine) -> None:
    global _checked
    if not _checked and engine.size > 1:
        _checked = True
        for check in _checks:
            check(engine)


def is_initialized() -> bool:
    """Return whether `init()` was called."""
    return _engine is not None


def engine() -> Engine:
    """Return the engine in use.

    Raises:
        ValueError: If `init()` was not called.
    """
    if _engine is None:
        raise ValueError(
            "hvdtrain has not been initialized; call hvd.init() first, before you build the model. "
            "(import hvdtrain.keras as hvd; hvd.init())"
        )
    return _engine


def _open(choice: str, place: topology.Place | None, comm: Any) -> Engine:
    if choice == "single" or (choice == "auto" and (place is None or place.size == 1)):
        return SingleEngine()
    if choice == "mpi" or (choice == "auto" and not _horovod_serves(place)):
        return _mpi_engine(comm)
    try:
        from hvdtrain.collectives.horovod.engine import HorovodEngine

        return HorovodEngine(_communicator(comm))
    except ImportError as error:
        raise RuntimeError(
            f"HVDTRAIN_ENGINE=horovod, but Horovod cannot be loaded ({error}). Build it for this TensorFlow "
            "and MPI with: hvdtrain build-horovod. Or use HVDTRAIN_ENGINE=mpi, which needs no build."
        ) from error


def _mpi_engine(comm: Any) -> Engine:
    from hvdtrain.collectives.mpi.engine import MpiEngine

    return MpiEngine(_communicator(comm))


def _communicator(comm: Any) -> Any:
    """Return the communicator that a script asks for, which may write it as ranks of MPI's world."""
    if comm is None or hasattr(comm, "Get_group"):
        return comm
    from hvdtrain.collectives.mpi.engine import load_mpi

    mpi = load_mpi()
    return mpi.COMM_WORLD.Create_group(mpi.COMM_WORLD.Get_group().Incl(list(comm)))


def _horovod_serves(place: topology.Place | None) -> bool:
    """Decide for `auto`, and says on rank 0 why a Horovod that is there is not taken."""
    from hvdtrain.collectives.horovod import engine as horovod
    from hvdtrain.collectives.mpi import engine as mpi

    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        return False
    try:
        import tensorflow as tf
    except ImportError:
        return False
    reason = horovod.reason_not_to_use(tf.__version__, mpi.library_name(mpi.load_mpi()))
    if reason and "not built" not in reason and place is not None and place.rank == 0:
        logger.info(f"engine mpi, because {reason}.")
    return reason is None


def _check_world(engine: Engine, place: topology.Place | None) -> None:
    if place is None or place.size is None or place.size == engine.size:
        return
    raise RuntimeError(
        f"Rank {place.rank}: {place.launcher} started {place.size} processes, but the {engine.name} engine "
        f"({engine.library}) sees a world of {engine.size}. Each process would train a model of its own.\n"
        f"{_cure(engine, place)} `hvdtrain doctor` shows which MPI is where."
    )


def _tell_if_alone_in_a_job(place: topology.Place | None) -> None:
    """Print a line where a Slurm job has several tasks, and srun has not started this process as one of them."""
    tasks = topology.slurm_tasks()
    alone = place is None or (place.launcher == "Slurm" and place.size == 1)
    if alone and tasks > 1:
        script = sys.argv[0] or "train.py"
        logger.info(
            f"this Slurm job has {tasks} tasks, but this process was started alone, without srun, and "
            f"trains in a world of 1. To train on all of them type `hvdtrain run -np {tasks} {script}`, or "
            f"`srun --mpi=pmix python {script}` (pmi2 for MPICH); HVDTRAIN_ENGINE=single if one is meant."
        )


def _cure(engine: Engine, place: topology.Place) -> str:
    """Say what to type, by the launcher and the MPI that do not fit each other."""
    if engine.name == "single":
        return "HVDTRAIN_ENGINE=single is for one process: unset it, or start the script without a launcher."
    if place.launcher == "Slurm":
        pmi = "pmi2" if "MPICH" in engine.library or "Intel" in engine.library else "pmix"
        return (
            f"srun's PMI is not the one of this MPI: type `srun --mpi={pmi} ...` (`srun --mpi=list` shows what "
            "this cluster has), or start with mpirun inside the allocation."
        )
    if place.launcher == "horovodrun over Gloo":
        return "hvdtrain works over MPI: type `horovodrun --mpi ...` or `hvdtrain run ...`."
    return (
        f"The launcher belongs to {place.launcher}, the library that mpi4py loads to another MPI: type "
        "`hvdtrain run -np N script.py`, or call the mpirun that lies beside that library."
    )


def last_words(error: BaseException) -> str:
    """Return the sentence that TensorFlow has buried in an error of its own, to be repeated at the end.

    Args:
        error: What ends this process.

    Returns:
        The sentence of the engine's own error, or nothing if `error` says it already or there is none.
    """
    hidden = _original(error)
    return f"hvdtrain: {hidden}" if hidden is not error else ""


def await_cause(error: BaseException) -> None:
    """Wait for the rank that failed, if an error only reports its failure: its own error is the one to fix.

    That rank shows its error and then ends all ranks. Should it go on instead, it learns at its next operation that
    this one has left, and this one goes on to show the error.

    Args:
        error: What ends this process.
    """
    if _engine is not None and _engine.size > 1 and _is_reported(error):
        with contextlib.suppress(Exception):
            _engine.agree(_LEAVES)


def _is_reported(error: BaseException | None) -> bool:
    """Return whether another rank's failure is what an error, or what it was raised from or during, reports."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if known(_original(error)) is Known.REPORTED:
            return True
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _original(error: BaseException) -> BaseException:
    found = (each.original(error) for each in _engines())
    return next((each for each in found if each is not error), error)


def _engines() -> list[Engine]:
    return [_engine, *_engines_of_sets()] if _engine is not None else []


def _engines_of_sets() -> list[Engine]:
    return [engine for _, engine in engines_of_sets.values() if engine is not None]


def _end_all_on_error(engine: Engine) -> None:
    """Make an uncaught error in one rank end all: the others would wait for it for ever."""
    previous: Callable = sys.excepthook

    def end_all(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        await_cause(value)
        previous(kind, value, traceback)
        if last_words(value):
            print(f"\n{last_words(value)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if engine.size > 1:
            engine.abort(1)

    sys.excepthook = end_all


def _end_together(engine: Engine) -> None:
    """End this rank when all ranks end; one that has left its training early is named on all of them."""
    if engine is not _engine:
        return
    try:
        engine.agree(_END)
        _check(engine)
    except MismatchError as error:
        logger.error(error)
        engine.abort(1)
