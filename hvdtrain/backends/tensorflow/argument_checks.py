"""What one rank asks for and cannot have, found before anything is sent."""

from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.collectives.engine import Engine


class ArgumentError(ValueError, tf.errors.InvalidArgumentError):
    """What one rank asks for is not possible. Both TensorFlow's error and Python's, as scripts catch either."""

    # With these arguments, and no others, TensorFlow can raise it again out of a function that it traces.
    def __init__(self, node_def: Any, op: Any, message: str, *args: Any) -> None:
        tf.errors.InvalidArgumentError.__init__(self, node_def, op, message, *args)

    def __str__(self) -> str:
        return str(self.message)


def refused(message: str) -> ArgumentError:
    """Return the error that says why a call is not possible."""
    return ArgumentError(None, None, message)


def check_root(engine: Engine, root_rank: int) -> None:
    """Raise ArgumentError if there is no such rank among those that take part."""
    try:
        engine.check_root(root_rank, "broadcast")
    except ValueError as error:
        raise refused(str(error)) from None


def rank_in_world(engine: Engine) -> int:
    """Return this process's number in the world, which is what people know it by."""
    return engine.ranks[engine.rank]


def equal_splits(engine: Engine, array: np.ndarray) -> list[int]:
    """Divide rows among the ranks; raises ArgumentError if they do not divide."""
    if len(array) % engine.size:
        raise refused(
            f"alltoall: without `splits` the first dimension must divide by the {engine.size} ranks. "
            f"Received on rank {rank_in_world(engine)}: shape {array.shape}. Pass `splits`."
        )
    return [len(array) // engine.size] * engine.size


def checked_splits(engine: Engine, array: np.ndarray, splits: np.ndarray) -> list[int]:
    """Read how many rows go to each rank; raises ArgumentError if they do not fit the array."""
    counts = [int(each) for each in splits.reshape(-1)]
    if splits.ndim != 1 or len(counts) != engine.size or min(counts) < 0 or sum(counts) > len(array):
        raise refused(
            f"alltoall: `splits` must hold one count for each of the {engine.size} ranks, which add up to at "
            f"most {len(array)}, the first dimension. Received on rank {rank_in_world(engine)}: "
            f"splits={splits.tolist()}."
        )
    return counts
