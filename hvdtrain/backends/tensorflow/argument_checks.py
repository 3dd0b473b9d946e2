"""Check the arguments of a collective on one rank, before anything is sent."""

from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.collectives.agreement import root_index
from hvdtrain.collectives.engine import Engine


class ArgumentError(ValueError, tf.errors.InvalidArgumentError):
    """An argument on one rank is invalid. Derived from TensorFlow's and Python's errors: scripts catch either."""

    # Only with these arguments can TensorFlow raise the error again from a function that it traces.
    def __init__(self, node_def: Any, op: Any, message: str, *args: Any) -> None:
        tf.errors.InvalidArgumentError.__init__(self, node_def, op, message, *args)

    def __str__(self) -> str:
        return str(self.message)


def refused(message: str) -> ArgumentError:
    """Return the error for an invalid call."""
    return ArgumentError(None, None, message)


def check_root(engine: Engine, root_rank: int) -> None:
    """Raise ArgumentError if `root_rank` is not one of the participating ranks."""
    try:
        root_index(engine.ranks, root_rank, "broadcast")
    except ValueError as error:
        raise refused(str(error)) from None


def rank_in_world(engine: Engine) -> int:
    """Return this process's rank in the world, which messages show to users."""
    return engine.ranks[engine.rank]


def equal_splits(engine: Engine, array: np.ndarray) -> list[int]:
    """Divide rows equally among the ranks; raise ArgumentError if they are not divisible."""
    if len(array) % engine.size:
        raise refused(
            f"alltoall: without `splits` the first dimension must divide by the {engine.size} ranks. "
            f"Received on rank {rank_in_world(engine)}: shape {array.shape}. Pass `splits`."
        )
    return [len(array) // engine.size] * engine.size


def checked_splits(engine: Engine, array: np.ndarray, splits: np.ndarray) -> list[int]:
    """Return the number of rows for each rank; raise ArgumentError if `splits` does not match the array."""
    counts = [int(count) for count in splits.reshape(-1)]
    if splits.ndim != 1 or len(counts) != engine.size or min(counts) < 0 or sum(counts) > len(array):
        raise refused(
            f"alltoall: `splits` must hold one count for each of the {engine.size} ranks, which add up to at "
            f"most {len(array)}, the first dimension. Received on rank {rank_in_world(engine)}: "
            f"splits={splits.tolist()}."
        )
    return counts
