"""Run a training function that resumes from its last commit, in this job and in the next."""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from hvdtrain import runtime
from hvdtrain.collectives.engine import Call, Engine, MismatchError
from hvdtrain.keras.elastic.events import HorovodInternalError, HostsUpdatedInterrupt
from hvdtrain.keras.elastic.state import ObjectState
from hvdtrain.keras.elastic.store import Snapshot, Store

_RESTORING = Call("restoring the last commit of hvd.elastic.run")
_END = Call("end of the function under hvd.elastic.run")

# Number of calls of each function. A restarted script makes the same calls, so each finds its own commit.
_calls: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Make a training function resume from its last commit, after an error and after a restart of the job.

    Before `func` runs, all ranks get the state of rank 0. If it raises `HorovodInternalError`, on one rank or on
    all, every rank restores the last commit and runs it again. Rank 0 also writes each commit to disk, into
    `.hvdtrain_elastic/` or the folder in HVDTRAIN_ELASTIC_DIR: if the job is killed and the same script is started
    again with the same arguments, it resumes from there, on any number of ranks. When `func` returns, the file is
    removed.

    Ranks cannot be added or removed while a job runs, because MPI does not support it. The API is Horovod's
    (https://horovod.readthedocs.io/en/stable/elastic_include.html).

    Args:
        func: A function whose first argument is the state. It must contain all communication after the state was
            created.

    Returns:
        The function, to be called on all ranks.
    """

    @functools.wraps(func)
    def keep_running(state: Any, *args: Any, **kwargs: Any) -> Any:
        engine = runtime.engine()
        store = _opened(engine, state, getattr(func, "__qualname__", "function"))
        result = _until_done(engine, state, lambda: func(state, *args, **kwargs))
        if store is not None:
            state._store = None
            if engine.rank == 0:
                store.remove()
        return result

    return keep_running


def _opened(engine: Engine, state: Any, name: str) -> Store | None:
    """Attach a file to the state, and load the last commit of an earlier job from it."""
    store = Store.of(name, next(_calls[name])) if isinstance(state, ObjectState) else None
    place = f"; a restarted job resumes from the last commit, in {store.path}" if store is not None else ""
    engine.say(
        f"elastic: the job keeps the number of its ranks, {engine.size}, to the end, because MPI cannot add or "
        f"remove ranks within a launch{place}."
    )
    if store is not None:
        _take_last_commit(engine, state, store)
        state._store = store
    return store


def _take_last_commit(engine: Engine, state: ObjectState, store: Store) -> None:
    snapshot = _last_commit(engine, state, store)
    if snapshot is not None:
        state._adopt(snapshot)
        engine.say(f"elastic: resuming from the last commit ({_summary(snapshot)}).")
    own = engine.broadcast_object(snapshot.own if snapshot is not None else [])
    if engine.rank < len(own):
        state._adopt_own(own[engine.rank])


def _last_commit(engine: Engine, state: ObjectState, store: Store) -> Snapshot | None:
    """Return the commit, on rank 0 only; raise an error on all ranks if it cannot be used."""
    snapshot = problem = None
    if engine.rank == 0:
        try:
            snapshot = store.read()
            problem = _difference_text(state, store, snapshot)
        except (ValueError, OSError, AttributeError, ImportError) as error:
            problem = str(error)
    problem = engine.broadcast_object(problem)
    if problem:
        raise ValueError(f"elastic: {problem}")
    return snapshot


def _difference_text(state: ObjectState, store: Store, snapshot: Snapshot | None) -> str | None:
    difference = state._difference(snapshot) if snapshot is not None else None
    if difference is None:
        return None
    return (
        f"the last commit in {store.path} is of another training: {difference}. Remove the file to start from the "
        "beginning, or set HVDTRAIN_ELASTIC_DIR to another folder."
    )


def _until_done(engine: Engine, state: Any, function: Callable[[], Any]) -> Any:
    synchronised = False
    while True:
        try:
            if not synchronised:
                state.sync()
            result = function()
            engine.agree(_END)
            return result
        except HostsUpdatedInterrupt as interrupt:
            synchronised = interrupt.skip_sync
        except Exception as error:
            if not _requires_restore(error):
                raise
            _wait_for_all(engine)
            where = f": {error}" if isinstance(error, HorovodInternalError) else " on another rank"
            engine.say(f"elastic: restoring the last commit after an internal error{where}")
            state.restore()
            synchronised = False
        state.on_reset()


def _requires_restore(error: Exception) -> bool:
    """Return whether this rank, or another one while this one trained, has met an internal error."""
    return isinstance(error, HorovodInternalError) or _RESTORING.kind in str(error)


def _wait_for_all(engine: Engine) -> None:
    """Wait for all ranks; those that are still training get a MismatchError from this, and come here too."""
    while True:
        try:
            engine.agree(_RESTORING)
            return
        except MismatchError:
            continue


def _summary(snapshot: Snapshot) -> str:
    shown = [
        f"{name} {value}" for name, value in snapshot.values.items() if isinstance(value, int | float | str)
    ]
    return ", ".join(shown) or "no attributes"
