"""Run a function on rank 0 only, and give its result or its error to all ranks."""

import pickle
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from hvdtrain.collectives.engine import Engine
from hvdtrain.collectives.errors import Known, mark

_alone: ContextVar[bool] = ContextVar("rank 0 runs a function while the others wait", default=False)


def is_alone() -> bool:
    """Return whether this process is inside `on_rank_zero`, where it must not communicate."""
    return _alone.get()


def on_rank_zero(engine: Engine, work: Callable[[], Any]) -> Any:
    """Return on every rank what `work` returns on rank 0.

    Args:
        engine: The ranks.
        work: A function that is called on rank 0 only. It must not communicate.

    Raises:
        Exception: On every rank, the exception that `work` raised on rank 0.
    """
    result, error = None, None
    if engine.rank == 0:
        token = _alone.set(True)
        try:
            result = work()
        except Exception as caught:
            error = caught
        finally:
            _alone.reset(token)
    result, failure = engine.broadcast_object((result, _portable(error)))
    if failure is not None:
        raise mark(failure, Known.REPORTED) if error is None else mark(error, Known.ORIGINAL)
    return result


def _portable(error: Exception | None) -> Exception | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
