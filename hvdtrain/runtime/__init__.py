"""Hold the engine in use, and check that its world is the one that was launched."""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from hvdtrain import heartbeat, settings, topology
from hvdtrain.collectives.engine import Call, Engine, MismatchError
from hvdtrain.collectives.errors import Known, known, mark, original
from hvdtrain.collectives.single import SingleEngine
from hvdtrain.messages import logger
from hvdtrain.runtime import self_watch

CHOICES = ("auto", "horovod", "mpi", "single")

# The call of a rank that only reports the failure of another one: it waits until that rank ends all ranks.
_LEAVES = Call("the end of a rank that cannot go on, because another one has failed", farewell=True)
# The call of a rank at its end: a rank that is still training gets an error instead of waiting forever.
_END = Call("end of the script")


_engine: Engine | None = None
_checks: list[Callable[[Engine], None]] = []
_checked = False
# For each process set, by its number: its ranks, and its engine, or None if this rank is not a member.
engines_of_sets: dict[int, tuple[tuple[int, ...], Engine | None]] = {}


def init(comm: Any = None) -> Engine:
    """Connect this process to the world in which it was launched. Further calls do nothing.

    `HVDTRAIN_ENGINE` chooses the engine: `auto` (default) uses Horovod if it is built for exactly this
    TensorFlow and MPI, else mpi, and `single` in a process that was started without a launcher.

    Args:
        comm: The world, if it is a part of the launched ranks: an mpi4py communicator, or ranks of MPI's world.

    Returns:
        The engine in use.

    Raises:
        RuntimeError: On every rank, if the number of processes that the launcher started differs from the size of
            MPI's world: otherwise each rank would train alone.
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
            _report_if_alone_in_job(place)
        _end_all_on_error(engine)
        atexit.register(_end_together, engine)
        self_watch.start(engine)
        _engine, _checked = engine, False
    return _engine


def shutdown() -> None:
    """Leave the world; all ranks call this. Collectives raise ValueError until `init()` is called again.

    Raises:
        MismatchError: On every rank, if some ranks are still running.
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
        for open_engine in (*parts, engine):
            open_engine.closed = True
            open_engine.shutdown()


def before_end(check: Callable[[Engine], None]) -> None:
    """Register a function that compares the ranks when all of them have reached their end.

    Args:
        check: Takes the world's engine, and is called on all ranks. An error that it raises ends the job.
    """
    _checks.append(check)


def finish() -> None:
    """Wait for all ranks at the end of the script, and compare them while an error can still be reported.

    Raises:
        MismatchError: On every rank, if some ranks are still running, or a check finds that the ranks differ.
    """
    if _engine is not None:
        try:
            _engine.agree(_END)
        except MismatchError as error:
            # The ranks that are still running show their position; this rank has nothing to add.
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
    """Return the communicator that a script requests, either directly or as ranks of MPI's world."""
    if comm is None or hasattr(comm, "Get_group"):
        return comm
    from hvdtrain.collectives.mpi.engine import load_mpi

    mpi = load_mpi()
    return mpi.COMM_WORLD.Create_group(mpi.COMM_WORLD.Get_group().Incl(list(comm)))


def _horovod_serves(place: topology.Place | None) -> bool:
    """Return whether `auto` uses Horovod; report on rank 0 why an installed Horovod is not used."""
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
        f"{_advice(engine, place)} `hvdtrain doctor` shows which MPI is where."
    )


def _report_if_alone_in_job(place: topology.Place | None) -> None:
    """Print a message if a Slurm job has several tasks and srun has not started this process as one of them."""
    tasks = topology.slurm_tasks()
    alone = place is None or (place.launcher == "Slurm" and place.size == 1)
    if alone and tasks > 1:
        script = sys.argv[0] or "train.py"
        logger.info(
            f"this Slurm job has {tasks} tasks, but this process was started alone, without srun, and "
            f"trains in a world of 1. To train on all of them type `hvdtrain run -np {tasks} {script}`, or "
            f"`srun --mpi=pmix python {script}` (pmi2 for MPICH); HVDTRAIN_ENGINE=single if one is meant."
        )


def _advice(engine: Engine, place: topology.Place) -> str:
    """Return the command to type, for a launcher and an MPI that do not match."""
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
    """Return the message of an engine's error that TensorFlow has replaced, to be repeated at the end.

    Args:
        error: The error that ends this process.

    Returns:
        The message of the engine's error; empty if `error` is that error itself or there is none.
    """
    hidden = _original(error)
    return f"hvdtrain: {hidden}" if hidden is not error else ""


def await_cause(error: BaseException) -> None:
    """Wait for the rank that failed, if an error only reports its failure: the error of that rank must be fixed.

    That rank shows its error and then ends all ranks. If it continues instead, it gets an error at its next
    operation, and this rank shows its own error.

    Args:
        error: The error that ends this process.
    """
    if _engine is not None and _engine.size > 1 and _is_reported(error):
        with contextlib.suppress(Exception):
            _engine.agree(_LEAVES)


def _is_reported(error: BaseException | None) -> bool:
    """Return whether an error, or one from which or during which it was raised, reports another rank's failure."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if known(_original(error)) is Known.REPORTED:
            return True
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _original(error: BaseException) -> BaseException:
    originals = [original(engine, error) for engine in _engines()]
    return next((first for first in originals if first is not error), error)


def _engines() -> list[Engine]:
    return [_engine, *_engines_of_sets()] if _engine is not None else []


def _engines_of_sets() -> list[Engine]:
    return [engine for _, engine in engines_of_sets.values() if engine is not None]


def _end_all_on_error(engine: Engine) -> None:
    """Let an uncaught error in one rank end all ranks: otherwise the others would wait forever."""
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
    """End this rank when all ranks end; if one has left its training early, all ranks name it."""
    if engine is not _engine:
        return
    try:
        engine.agree(_END)
        _check(engine)
    except MismatchError as error:
        logger.error(error)
        engine.abort(1)
