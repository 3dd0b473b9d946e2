"""Numbers whose sum over ranks is known exactly, and the loop that times a sum and checks it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

# Prime, so that no piece of a buffer is like another of a round size.
_PERIOD = 1009
_MOST = 128  # no sum is larger
_DRAWING = 64  # how many ranks draw one number


@dataclass(frozen=True)
class Way:
    """One way of summing an array over ranks.

    Args:
        barrier: Waits for all ranks.
        bound: Takes an array and returns what sums it over ranks each time it is called.
        fetch: Makes an array of what that returns.
    """

    barrier: Callable[[], Any]
    bound: Callable[[np.ndarray], Callable[[], Any]]
    fetch: Callable[[Any], np.ndarray] = np.asarray


def measure(way: Way, request: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """Sums over ranks as often as asked and checks the result, outside of what is timed.

    Args:
        way: How to sum.
        request: `bytes`, `dtype` and `seed` of the array, and how often to `repeat`.
        rank: This rank.
        size: How many ranks there are.

    Returns:
        `seconds` a sum, and whether the result is `right`.
    """
    dtype = np.dtype(_named(request["dtype"]))
    count = request["bytes"] // dtype.itemsize
    once = way.bound(np.resize(_table(request["seed"], rank, size, dtype), count))
    once()
    way.barrier()
    begun = perf_counter()
    for _ in range(request["repeat"]):
        result = once()
    seconds = (perf_counter() - begun) / request["repeat"]
    # MPI may need a rank that is through with its part to come back, before another is through with its own.
    way.barrier()
    expected = sum((_table(request["seed"], each, size, dtype) for each in range(size)), np.zeros((), dtype))
    return {"seconds": seconds, "right": _repeats(way.fetch(result), expected.astype(dtype))}


def _table(seed: int, rank: int, size: int, dtype: np.dtype) -> np.ndarray:
    """Draws small whole numbers; their sum over ranks is exact in every dtype that has 7 bits for it.

    Of many ranks each draws some of the numbers only, so that no sum needs more bits.
    """
    drawing = min(size, _DRAWING)
    below = min(11, _MOST // drawing)
    numbers = np.random.default_rng([seed, rank]).integers(0, below, _PERIOD)
    mine = (np.arange(_PERIOD) + rank) % -(-size // drawing) == 0
    return np.where(mine, numbers, 0).astype(dtype)


def _repeats(array: np.ndarray, table: np.ndarray) -> bool:
    """Tells whether an array is the table over and over again."""
    flat = array.reshape(-1)
    whole = len(flat) // len(table) * len(table)
    blocks = (flat[:whole].reshape(-1, len(table)) == table).all()
    return bool(blocks and (flat[whole:] == table[: len(flat) - whole]).all())


def _named(dtype: str) -> Any:
    if dtype == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return dtype
