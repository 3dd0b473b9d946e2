"""Pack small arrays into shared buffers, so that few operations send them all."""

import sys
from collections.abc import Sequence

import numpy as np

from hvdtrain.collectives.ops import Op

# At 16 MiB MPI_Allreduce over shared memory is at its fastest; larger buffers leave the caches.
BUCKET_BYTES = 16 << 20
# From this size on, the copy into a shared buffer costs more than the extra operation it saves.
ALONE_BYTES = 256 << 10
# From this size on, sending half the bytes saves more time than the second operation costs.
HALVED_BYTES = 256 << 10
# TensorFlow uses the memory of a NumPy array without a copy only if it starts at a multiple of so many bytes.
ALIGNMENT = 64
# A size that was not requested in this many requests is removed from the pool; many steps of any model.
_REQUESTS_KEPT = 4096


def plan(arrays: Sequence[np.ndarray]) -> list[list[int]]:
    """Group arrays so that few operations move them all and no large one is copied.

    Args:
        arrays: Arrays of any shapes and dtypes.

    Returns:
        Lists of indices, the same on all ranks. The arrays of a list have one dtype and together at most
        `BUCKET_BYTES`; an array of `ALONE_BYTES` or more is alone in its list.
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
    """Return whether 16-bit floats should be sent as such, instead of in one reduction of 32-bit floats."""
    narrow = array.dtype.name in ("float16", "bfloat16")
    return narrow and op in (Op.SUM, Op.AVERAGE) and array.nbytes >= HALVED_BYTES


def aligned_like(array: np.ndarray) -> np.ndarray:
    """Return an uninitialized array of the shape and dtype of `array` that TensorFlow need not copy."""
    return _POOL.take(array.nbytes).view(array.dtype).reshape(array.shape)


class _Pool:
    """Buffers that are reused as soon as no array refers to them.

    New memory for each step would cost a page fault every 4 KiB. Each view of a buffer keeps a reference to the
    array that owns the memory, so the reference count of the owner shows whether a result of an earlier step is
    still in use. Sizes that were not requested for a long time are removed.
    """

    def __init__(self) -> None:
        self._owners: dict[int, list[np.ndarray]] = {}
        self._last_request: dict[int, int] = {}
        self._requests = 0

    def take(self, nbytes: int) -> np.ndarray:
        """Return `nbytes` aligned bytes."""
        self._requests += 1
        self._last_request[nbytes] = self._requests
        if self._requests % _REQUESTS_KEPT == 0:
            self._remove_unused_sizes()
        owners = self._owners.setdefault(nbytes, [])
        free = next((owner for owner in owners if sys.getrefcount(owner) == _UNUSED), None)
        if free is None:
            free = np.empty(nbytes + ALIGNMENT, np.uint8)
            owners.append(free)
        offset = -free.ctypes.data % ALIGNMENT
        return free[offset : offset + nbytes]

    def _remove_unused_sizes(self) -> None:
        for nbytes in [
            size for size, last in self._last_request.items() if last <= self._requests - _REQUESTS_KEPT
        ]:
            del self._last_request[nbytes], self._owners[nbytes]


def _reference_count_when_unused() -> int:
    """Return how many references the search in `take` holds to a free buffer; it depends on the Python version."""
    owners = [np.empty(1, np.uint8)]
    return next(sys.getrefcount(owner) for owner in owners)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


_UNUSED = _reference_count_when_unused()
_POOL = _Pool()
