"""Reduce arrays to a few numbers by which the ranks compare them."""

import math
import zlib

import numpy as np

# Products with signs are summed in pieces, so that their float64 copy stays small.
_PIECE = 1 << 20


def checksum(array: np.ndarray) -> int:
    """Return a checksum of an array's bytes, without a copy: the array may fill most of the memory."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def projected(values: np.ndarray, rows: np.ndarray | None = None) -> tuple[float, float]:
    """Project an array on fixed signs, one per row times one per column.

    Args:
        values: The array, or the values of a sparse gradient.
        rows: The rows to which the values belong; by default all rows in order.

    Returns:
        The projection and the sum of magnitudes, in float64.
    """
    table = values.reshape(len(values), math.prod(values.shape[1:])) if values.ndim else values.reshape(1, 1)
    of_columns = _signs(np.arange(table.shape[1]))
    of_rows = _signs(np.arange(len(table)) if rows is None else rows)
    total = magnitude = 0.0
    step = max(_PIECE // max(table.shape[1], 1), 1)
    for start in range(0, len(table), step):
        piece = table[start : start + step].astype(np.float64)
        # Not with BLAS, which would start threads on cores that belong to other ranks.
        total += float(np.einsum("i,ij,j", of_rows[start : start + step], piece, of_columns))
        magnitude += float(np.abs(piece).sum())
    return total, magnitude


def _signs(numbers: np.ndarray) -> np.ndarray:
    """Return +1 or -1 for each number, the same on every rank (Knuth's multiplicative hash)."""
    mixed = numbers.astype(np.uint64) * np.uint64(2654435761) >> np.uint64(15)
    return 1.0 - 2.0 * (mixed & np.uint64(1)).astype(np.float64)


def smallest(dtype: np.dtype) -> float:
    """Return the magnitude below which a float dtype rounds coarsely or to zero."""
    if dtype.name == "bfloat16":
        return float(np.finfo(np.float32).tiny)
    limits = np.finfo(dtype)
    return float(limits.smallest_subnormal if dtype == np.float16 else limits.tiny)


def precision(dtype: np.dtype) -> float:
    """Return the distance from 1 to the next number of a float dtype, NumPy's or bfloat16."""
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)
