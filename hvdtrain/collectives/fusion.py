"""Small arrays travel together: which ones, in which buffer, and where each lies in it."""

import sys
from collections.abc import Sequence

import numpy as np

from hvdtrain.collectives.ops import Op

# At 16 MiB MPI_Allreduce over shared memory is at its fastest; larger buffers leave the caches.
BUCKET_BYTES = 16 << 20
# From here on, the copy into a shared buffer costs more than the extra operation it saves.
ALONE_BYTES = 256 << 10
# From here on, halving what travels is worth the two operations that it takes.
HALVED_BYTES = 256 << 10
# TensorFlow takes over a NumPy array without copying it only if it starts on such a boundary.
ALIGNMENT = 64
# After so many requests for other sizes a size is forgotten; many steps of any model.
_MEMORY = 4096


def plan(arrays: Sequence[np.ndarray]) -> list[list[int]]:
    """Groups arrays so that few operations move them all and no large one is copied.

    Args:
        arrays: Arrays of any shapes and dtypes.

    Returns:
        Lists of indices. Arrays of a list have one dtype and together at most `BUCKET_BYTES`; an array of
        `ALONE_BYTES` or more is alone in its list. The same on all ranks.
    """
    buckets: list[list[int]] = []
    filling: dict[np.dtype, tuple[list[int], int]] = {}
    for index, array in enumerate(arrays):
        if array.nbytes >= ALONE_BYTES:
            buckets.append([index])
            continue
        bucket, filled = filling.get(array.dtype, ([], BUCKET_BYTES + 1))
        if filled + _padded(array.nbytes) > BUCKET_BYTES:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(index)
        filling[array.dtype] = (bucket, filled + _padded(array.nbytes))
    return buckets


def pack(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Copy arrays of one dtype into one buffer.

    Args:
        arrays: Arrays of the same dtype.

    Returns:
        The flat buffer, and for each array the view of the buffer that holds its copy.
    """
    dtype = arrays[0].dtype
    starts = np.cumsum([0] + [_padded(array.nbytes) // dtype.itemsize for array in arrays])
    buffer = _POOL.take(int(starts[-1]) * dtype.itemsize).view(dtype)
    slots = []
    for array, start, end in zip(arrays, starts, starts[1:], strict=False):
        slot = buffer[start : start + array.size]
        slot[...] = array.reshape(-1)
        buffer[start + array.size : end] = 0
        slots.append(slot.reshape(array.shape))
    return buffer, slots


def worth_halving(array: np.ndarray, op: Op) -> bool:
    """Return whether 16-bit floats should travel as they are, instead of in one reduction of 32-bit floats."""
    narrow = array.dtype.name in ("float16", "bfloat16")
    return narrow and op in (Op.SUM, Op.AVERAGE) and array.nbytes >= HALVED_BYTES


def aligned_like(array: np.ndarray) -> np.ndarray:
    """Return an uninitialised array of the shape and dtype of `array` that TensorFlow need not copy."""
    return _POOL.take(array.nbytes).view(array.dtype).reshape(array.shape)


class _Pool:
    """Buffers that are used again as soon as nobody looks at them any more.

    New memory for each step would cost a page fault every 4 KiB. NumPy keeps a buffer's owner alive
    through each view of it, so its reference count tells whether a result of an earlier step still is in use.
    A size that nobody has asked for in a long while is forgotten.
    """

    def __init__(self) -> None:
        self._owners: dict[int, list[np.ndarray]] = {}
        self._asked: dict[int, int] = {}
        self._requests = 0

    def take(self, nbytes: int) -> np.ndarray:
        """Return `nbytes` aligned bytes."""
        self._requests += 1
        self._asked[nbytes] = self._requests
        if self._requests % _MEMORY == 0:
            self._forget()
        owners = self._owners.setdefault(nbytes, [])
        free = next((owner for owner in owners if sys.getrefcount(owner) == _UNUSED), None)
        if free is None:
            free = np.empty(nbytes + ALIGNMENT, np.uint8)
            owners.append(free)
        offset = -free.ctypes.data % ALIGNMENT
        return free[offset : offset + nbytes]

    def _forget(self) -> None:
        for nbytes in [each for each, asked in self._asked.items() if asked <= self._requests - _MEMORY]:
            del self._asked[nbytes], self._owners[nbytes]


def _reference_count_when_unused() -> int:
    """Count the references that the pool's own search for a free buffer holds; it depends on the Python."""
    owners = [np.empty(1, np.uint8)]
    return next(sys.getrefcount(owner) for owner in owners)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


_UNUSED = _reference_count_when_unused()
_POOL = _Pool()
