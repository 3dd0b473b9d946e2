"""Work on large arrays in pieces that stay in the cache, without temporary arrays of their size."""

from collections.abc import Iterator, Sequence

import numpy as np

from hvdtrain.gradients.schemes import Group

# Elements of a piece.
PIECE = 1 << 16


def pieces(size: int) -> Iterator[slice]:
    """Yield the parts of a flat array."""
    for start in range(0, size, PIECE):
        yield slice(start, start + PIECE)


def subtract(flat: np.ndarray, other: np.ndarray, factor: float) -> None:
    """Subtract a multiple of another flat array in place."""
    for piece in pieces(len(flat)):
        flat[piece] -= other[piece] * flat.dtype.type(factor)


def as_given(results: Sequence[np.ndarray], group: Group) -> list[np.ndarray]:
    """Return results in the dtypes of a group's arrays."""
    return [
        result.astype(array.dtype, copy=False) for result, array in zip(results, group.arrays, strict=True)
    ]
