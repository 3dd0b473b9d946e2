"""Run a training function that resumes from its last commit, in this job and in the next."""

import functools
import hashlib
import itertools
import pickle
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hvdtrain import runtime, settings
from hvdtrain.checkpoints.folder import replace_file
from hvdtrain.collectives.engine import Call, Engine, MismatchError
from hvdtrain.collectives.errors import HorovodInternalError, HostsUpdatedInterrupt
from hvdtrain.keras.checkpointing.checkpoint_files import gathered
from hvdtrain.keras.elastic.state import ObjectState

_RESTORING = Call("restoring the last commit of hvd.elastic.run")
_END = Call("end of the function under hvd.elastic.run")
_HEAD = b"hvdtrain elastic 2\n"  # of the file of a commit; a checksum and the pickled content follow
_FIRST_HEAD = b"hvdtrain elastic 1\n"
_CHECKSUM_BYTES = hashlib.sha256().digest_size

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
        function = functools.partial(func, state, *args, **kwargs)
        fixed = (
            f"elastic: the job keeps the number of its ranks, {engine.size}, to the end, because MPI cannot add or "
            "remove ranks within a launch"
        )
        if not isinstance(state, ObjectState):
            engine.say(f"{fixed}.")
            return _until_done(engine, state, function)
        path = _path_of_next_call(getattr(func, "__qualname__", "function"))
        engine.say(f"{fixed}; a restarted job resumes from the last commit, in {path}.")
        _resume(engine, state, path)
        state._on_commit = functools.partial(_write, engine, path, state)
        result = _until_done(engine, state, function)
        state._on_commit = None
        if engine.rank == 0:
            _remove(path)
        return result

    return keep_running


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


def _resume(engine: Engine, state: ObjectState, path: Path) -> None:
    """Load the last commit of an earlier job, if there is one; raise an error on all ranks if it cannot be used."""
    commit = problem = None
    if engine.rank == 0:
        try:
            commit = _read(path)
            difference = _difference(state, commit) if commit is not None else None
            if difference:
                problem = (
                    f"the last commit in {path} is of another training: {difference}. Remove the file to start "
                    "from the beginning, or set HVDTRAIN_ELASTIC_DIR to another folder."
                )
        except (ValueError, OSError, AttributeError, ImportError) as error:
            problem = str(error)
    problem = engine.broadcast_object(problem)
    if problem:
        raise ValueError(f"elastic: {problem}")
    if commit is not None:
        state._load(commit["values"], commit["shared"])
        shown = [
            f"{name} {value}"
            for name, value in commit["values"].items()
            if isinstance(value, int | float | str)
        ]
        engine.say(f"elastic: resuming from the last commit ({', '.join(shown) or 'no attributes'}).")
    parts = engine.broadcast_object(commit["ranks"] if commit is not None else [])
    if engine.rank < len(parts):
        state._load_own(pickle.loads(parts[engine.rank]))


def _difference(state: ObjectState, commit: dict[str, Any]) -> str | None:
    """Return how a commit differs from the state, or None if they fit."""
    ours, theirs = state._described(), commit["described"]
    if len(ours) != len(theirs):
        return f"it has {len(theirs)} variables, the state has {len(ours)}"
    for mine, other in zip(ours, theirs, strict=True):
        if mine != other:
            return f"where it has {other}, the state has {mine}"
    names, saved_names = sorted(state._saved_state), sorted(commit["values"])
    if names != saved_names:
        return f"it has the attributes {saved_names}, the state has {names}"
    return None


def _path_of_next_call(function: str) -> Path:
    """Return the file for the next call of a function in this script with its arguments."""
    folder = Path(settings.get("HVDTRAIN_ELASTIC_DIR")).absolute()
    script = Path(sys.argv[0] or "interactive").absolute()
    identity = "\0".join([str(script), *sys.argv[1:], function, str(next(_calls[function]))])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
    return folder / f"{script.stem}-{digest}.state"


def _read(path: Path) -> dict[str, Any] | None:
    """Return the last commit, or None if there is none; raise ValueError if the file is damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if content.startswith(_FIRST_HEAD):
        raise ValueError(
            f"The last commit in {path} is of an earlier version of hvdtrain. Remove the file to start from the "
            "beginning."
        )
    begin = len(_HEAD) + _CHECKSUM_BYTES
    body = content[begin:]
    if content[:begin] != _HEAD + hashlib.sha256(body).digest():
        raise ValueError(
            f"The last commit in {path} is damaged: its checksum is wrong. Remove the file to start from the "
            "beginning."
        )
    return pickle.loads(body)


def _write(engine: Engine, path: Path, state: ObjectState) -> None:
    """Replace the previous commit by the saved state; all ranks call this, and rank 0 writes.

    Raises:
        TypeError: On rank 0, if an attribute of the state cannot be pickled.
    """
    values = state._saved_state
    shared, own = state._saved_values()
    ranks = gathered(pickle.dumps(own, protocol=5), engine)
    if engine.rank != 0:
        return
    commit = {"values": values, "described": state._described(), "shared": shared, "ranks": ranks}
    try:
        body = pickle.dumps(commit, protocol=5)
    except Exception as error:
        name = next((name for name, value in values.items() if not _can_pickle(value)), "?")
        raise TypeError(
            f"The state cannot be committed to disk: its attribute {name!r} cannot be pickled ({error}). "
            "Keep plain values in the state: numbers, strings, arrays, lists and dictionaries of them."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, _HEAD, hashlib.sha256(body).digest(), body)


def _can_pickle(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


def _remove(path: Path) -> None:
    """Remove the commit, and the folder if it is empty."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()
