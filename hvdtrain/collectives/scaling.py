"""Multiply arrays before and after a reduction: Horovod's prescaling and postscaling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hvdtrain.collectives.engine import Call, Engine, Op, StandIn

# Horovod scales integers in float64, and 16-bit floats in float32.
_SCALED_IN = {"float16": np.float32, "bfloat16": np.float32, "float32": np.float32}


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
    engine: Engine,
    reduction: Reduction,
    kind: str,
    arrays: Sequence[np.ndarray],
    reduce: Callable[[Engine, Sequence[np.ndarray], Op], list[np.ndarray]],
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
