"""Combine arrays over the ranks: pack small ones, sum in a wider dtype where needed, and turn sums into means."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hvdtrain.collectives import adasum, fusion
from hvdtrain.collectives.agreement import Call, StandIn
from hvdtrain.collectives.ops import Op, Pair, carrier

if TYPE_CHECKING:
    from hvdtrain.collectives.engine import Engine

# Horovod scales integers in float64, and 16-bit floats in float32.
_SCALED_IN = {"float16": np.float32, "bfloat16": np.float32, "float32": np.float32}


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
        with engine._span("MEMCPY_IN_FUSION_BUFFER"):
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
    with engine._span("ALLREDUCE"):
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


@dataclass(frozen=True)
class Reduction:
    """An operation with its two factors.

    Args:
        op: Any `Op`.
        prescale: Factor applied to each rank's values before they are sent.
        postscale: Factor applied to the result.
    """

    op: Op = Op.AVERAGE
    prescale: float = 1.0
    postscale: float = 1.0

    @property
    def scales(self) -> bool:
        """True if a factor changes anything."""
        return (self.prescale, self.postscale) != (1.0, 1.0)


def reduced(
    engine: "Engine",
    reduction: Reduction,
    kind: str,
    arrays: Sequence[np.ndarray],
    reduce: Callable[["Engine", Sequence[np.ndarray], Op], list[np.ndarray]],
) -> list[np.ndarray]:
    """Scale, reduce and scale again; the ranks compare the factors only if one differs from 1."""
    if not reduction.scales:
        return reduce(engine, arrays, reduction.op)
    factors = f"prescale_factor={reduction.prescale}, postscale_factor={reduction.postscale}"
    engine.agree(Call(kind, (factors,), stand_in=StandIn()))
    scaled = [_scaled(array, reduction.prescale) for array in arrays]
    if reduction.op is not Op.AVERAGE or reduction.postscale == 1.0:
        return [_scaled(array, reduction.postscale) for array in reduce(engine, scaled, reduction.op)]
    # A mean of integers is rounded, so the factor is applied to the sum.
    sums = reduce(engine, [_wide(array) for array in scaled], Op.SUM)
    factor = reduction.postscale / engine.size
    return [_scaled(total, factor).astype(array.dtype) for total, array in zip(sums, arrays, strict=True)]


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    """Multiply an array; integers are rounded toward zero, as in Horovod."""
    if factor == 1.0:
        return array
    wide = np.dtype(_SCALED_IN.get(array.dtype.name, np.float64))
    return np.asarray(array.astype(wide) * wide.type(factor)).astype(array.dtype)


def _wide(array: np.ndarray) -> np.ndarray:
    """Cast small integers to int64, so that their sum does not overflow."""
    return array.astype(np.int64) if array.dtype.kind in "iu" and array.dtype.itemsize < 8 else array
