"""Combine arrays over the ranks: pack small ones, sum in a wider dtype where needed, and turn sums into means."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hvdtrain.collectives import adasum, fusion
from hvdtrain.collectives.ops import Op, Pair, carrier

if TYPE_CHECKING:
    from hvdtrain.collectives.engine import Engine


def combine(
    engine: "Engine", arrays: Sequence[np.ndarray], op: Op, in_place: Sequence[bool]
) -> list[np.ndarray]:
    """Combine many arrays; small ones are sent together.

    Args:
        engine: Moves the arrays; its ranks have agreed on the operation.
        arrays: Contiguous arrays that can be reduced.
        op: How they are combined.
        in_place: For each array whether its result takes its place.

    Returns:
        The combined arrays. New ones may share memory with each other.
    """
    results: list[Any] = [array if reuse else None for array, reuse in zip(arrays, in_place, strict=True)]
    pairs: list[Pair] = []
    packed: list[tuple[int, np.ndarray]] = []
    for bucket in fusion.plan(arrays):
        if len(bucket) == 1 or op is Op.ADASUM:  # Adasum combines each array separately
            for index in bucket:
                if results[index] is None:
                    results[index] = fusion.aligned_like(arrays[index])
                pairs.append((arrays[index], results[index]))
            continue
        with engine.span("MEMCPY_IN_FUSION_BUFFER"):
            buffer, slots = fusion.pack([arrays[index] for index in bucket])
        pairs.append((buffer, buffer))
        packed += zip(bucket, slots, strict=True)
    reduce_pairs(engine, pairs, op)
    for index, slot in packed:
        if results[index] is None:
            results[index] = slot
        else:
            results[index][...] = slot
    return results


def reduce_pairs(engine: "Engine", pairs: Sequence[Pair], op: Op) -> None:
    """Combine each pair's first array into its second, in a wider dtype where the sum would lose something."""
    with engine.span("ALLREDUCE"):
        same_dtype: dict[np.dtype, list[Pair]] = {}
        for send, receive in pairs:
            mean_of_integers = op is Op.AVERAGE and send.dtype.kind in "iu"
            if mean_of_integers or op is Op.ADASUM or carrier(send.dtype, op) != send.dtype:
                _reduce_wide(engine, send, receive, op)
            else:
                same_dtype.setdefault(send.dtype, []).append((send, receive))
        for members in same_dtype.values():
            engine._reduce_all(members, op)


def _reduce_wide(engine: "Engine", send: np.ndarray, receive: np.ndarray, op: Op) -> None:
    wide = carrier(send.dtype, op)
    if op is Op.ADASUM:
        receive[...] = adasum.combine(
            send.astype(wide),
            engine.rank,
            engine.size,
            lambda array, partner: _exchange_whole(engine, array, partner),
        )
    elif fusion.worth_halving(send, op):
        receive[...] = _sum_of_halves(engine, send, op)
    elif op is Op.AVERAGE and wide.kind in "iu":
        total = send.astype(wide)
        engine._reduce(total, total, Op.SUM)
        receive[...] = averaged(total.copy(), op, engine.size)
        _warn_of_zeros(engine, total, receive)
    else:
        copy = send.astype(wide)
        engine._reduce(copy, copy, op)
        with np.errstate(over="ignore"):  # values that are too large become infinite, as in any sum of floats
            receive[...] = copy


def _warn_of_zeros(engine: "Engine", total: np.ndarray, mean: np.ndarray) -> None:
    """Warn once where a mean of integers, which is an integer, has become 0."""
    lost = total[(mean == 0) & (total != 0)]
    if lost.size and not engine.warned_of_zeros:
        engine.warned_of_zeros = True
        engine.warn(
            f"a mean of integers was rounded to 0: the sum {lost[0]} of {engine.size} ranks, divided by "
            f"{engine.size}. Pass floats, as in hvd.allreduce(tf.cast(x, tf.float32)), or op=hvd.Sum."
        )


def _sum_of_halves(engine: "Engine", array: np.ndarray, op: Op) -> np.ndarray:
    """Sum 16-bit floats in float32 but send only 16-bit floats: each rank sums one part of the array."""
    received, _ = engine._exchange(array.reshape(-1), rows_of_ranks(array.size, engine.size))
    total = received.reshape(engine.size, -1).astype(np.float32).sum(axis=0)
    mine = averaged(total, op, engine.size).astype(array.dtype)
    return engine._gather(mine)[0].reshape(array.shape)


def _exchange_whole(engine: "Engine", array: np.ndarray, partner: int) -> np.ndarray:
    """Return the array of another rank, which must be of the same shape."""
    flat = array.reshape(-1)
    splits = [flat.size if rank == partner else 0 for rank in range(engine.size)]
    return engine._exchange(flat, splits)[0].reshape(array.shape)


def reduce_and_take(engine: "Engine", array: np.ndarray, rows: Sequence[int], op: Op) -> np.ndarray:
    """Combine whole arrays and return this rank's rows, for engines that cannot scatter them."""
    whole = np.empty_like(array)
    engine._reduce(array, whole, op)
    start = sum(rows[: engine.rank])
    return whole[start : start + rows[engine.rank]].copy()


def averaged(total: np.ndarray, op: Op, size: int) -> np.ndarray:
    """Turn a sum over `size` ranks into a mean, in place; integers are rounded toward zero, as Horovod does."""
    if op is Op.AVERAGE and size > 1:
        if total.dtype.kind in "iu":
            total -= np.fmod(total, total.dtype.type(size))
            total //= total.dtype.type(size)
        elif size & (size - 1):
            np.divide(total, total.dtype.type(size), out=total)
        else:  # for a power of two this is as exact, and faster
            np.multiply(total, total.dtype.type(1 / size), out=total)
    return total


def rows_of_ranks(count: int, size: int) -> list[int]:
    """Divide a number of rows among the ranks; the first ranks get one more if it is not divisible."""
    return [count // size + (rank < count % size) for rank in range(size)]
