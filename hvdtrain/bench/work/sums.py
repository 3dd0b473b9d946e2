"""Time an allreduce and check its result against a sum that is known exactly."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

_PERIOD = (
    1009  # prime, so that no two pieces of a buffer are equal if they start at multiples of a round size
)
_MAX_SUM = 128  # no sum is larger, so that it is exact in every dtype
_MAX_SUMMANDS = 64  # at most this many ranks contribute to one number


@dataclass(frozen=True)
class Method:
    """One method of summing an array over ranks.

    Args:
        barrier: Waits for all ranks.
        bind: Takes an array and returns a function that sums this array over ranks each time it is called.
        fetch: Converts the result of that function to an array.
    """

    barrier: Callable[[], Any]
    bind: Callable[[np.ndarray], Callable[[], Any]]
    fetch: Callable[[Any], np.ndarray] = np.asarray


def measure(method: Method, request: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """Sum over ranks as often as requested, and check the result outside of the timed part.

    Args:
        method: The method of summing.
        request: `bytes`, `dtype` and `seed` of the array, and the number of repetitions, `repeat`.
        rank: This rank.
        size: Number of ranks.

    Returns:
        The `seconds` of one sum, and whether the result is `right`.
    """
    dtype = np.dtype(_numpy_dtype(request["dtype"]))
    count = request["bytes"] // dtype.itemsize
    once = method.bind(np.resize(summands(request["seed"], rank, size, dtype), count))
    once()
    method.barrier()
    begun = perf_counter()
    for _ in range(request["repeat"]):
        result = once()
    seconds = (perf_counter() - begun) / request["repeat"]
    # MPI makes progress only inside of its calls: a rank that has finished may still be needed by another rank.
    method.barrier()
    expected = np.zeros((), dtype)
    for other in range(size):
        expected = expected + summands(request["seed"], other, size, dtype)
    return {"seconds": seconds, "right": _is_repeated(method.fetch(result), expected.astype(dtype))}


def summands(seed: int, rank: int, size: int, dtype: np.dtype) -> np.ndarray:
    """Return small random integers; their sum over ranks is exact in every dtype with 7 bits for it.

    With many ranks, each rank contributes only to some of the numbers, so that no sum needs more bits.

    Args:
        seed: Seed of the random numbers.
        rank: The rank whose numbers are returned.
        size: Number of ranks.
        dtype: Data type of the numbers.

    Returns:
        An array of shape (1009,).
    """
    contributing = min(size, _MAX_SUMMANDS)
    below = min(11, _MAX_SUM // contributing)
    numbers = np.random.default_rng([seed, rank]).integers(0, below, _PERIOD)
    mine = (np.arange(_PERIOD) + rank) % -(-size // contributing) == 0
    return np.where(mine, numbers, 0).astype(dtype)


def _is_repeated(array: np.ndarray, period: np.ndarray) -> bool:
    """Return whether an array consists of repetitions of `period`, of which the last may be cut off."""
    flat = array.reshape(-1)
    whole = len(flat) // len(period) * len(period)
    blocks = (flat[:whole].reshape(-1, len(period)) == period).all()
    return bool(blocks and (flat[whole:] == period[: len(flat) - whole]).all())


def _numpy_dtype(dtype: str) -> Any:
    if dtype == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return dtype
