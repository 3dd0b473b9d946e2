"""Let ranks that have joined take part with zeros in the remaining operations, as Horovod's `join` does."""

from typing import TYPE_CHECKING

import numpy as np

from hvdtrain.collectives import reduction
from hvdtrain.collectives.agreement import JOIN, Call, StandIn, explain_mismatch
from hvdtrain.collectives.errors import Known, MismatchError, mark
from hvdtrain.collectives.ops import pickled

if TYPE_CHECKING:
    from hvdtrain.collectives.engine import Engine


def wait_for_all(engine: "Engine") -> int:
    """Stand in for this rank until all ranks have joined.

    Returns:
        The rank that joined last; of several, the highest.

    Raises:
        MismatchError: On every rank, if another operation needs this rank.
    """
    while engine.size > 1 and not _all_have_joined(engine):
        _stand_in(engine, settle(engine, JOIN))
    last = set(engine.ranks) - engine._joined or set(engine.ranks)
    engine._joined = set()
    return max(last)


def settle(engine: "Engine", call: Call) -> Call:
    """Find the operation of the ranks when their calls differ: only calls of ranks that have joined may differ.

    Args:
        engine: The ranks.
        call: The call of this rank.

    Returns:
        The call of the ranks that have not joined; the engine stores which ranks have joined.

    Raises:
        MismatchError: On every rank, if the others differ, or if they need the ranks that have joined.
    """
    calls = engine._gather_objects(pickled(call))
    engine._joined = {rank for rank, other in zip(engine.ranks, calls, strict=True) if other == JOIN}
    working = [other for other in calls if other != JOIN]
    stand_in = working[0].stand_in if engine._joined else None
    if stand_in is None or not stand_in.possible or any(other != working[0] for other in working):
        error = MismatchError(explain_mismatch(calls, engine.ranks))
        if any(other.farewell for other in calls) and not call.farewell:
            mark(error, Known.REPORTED)
        raise error
    return working[0]


def _all_have_joined(engine: "Engine") -> bool:
    engine._where = JOIN.where
    with engine._waiting():
        return engine._compared(JOIN.digest)[0]


def _stand_in(engine: "Engine", call: Call) -> None:
    """Take part in the operations of the other ranks, with zeros and without rows."""
    work = call.stand_in or StandIn()
    if work.native:
        engine.native_tensors().stand_in(call.kind, work)
        return
    if work.objects:
        engine._gather_objects(pickled(None))
    zeros = [np.zeros(shape, dtype) for dtype, shape in work.reduced]
    reduction.combine(engine, zeros, work.op, [True] * len(zeros))
    for dtype, shape in work.gathered:
        engine._gather(np.zeros((0, *shape), dtype))
