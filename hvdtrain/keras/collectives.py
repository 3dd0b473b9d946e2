"""Collectives on values, for what a script does around its training: sum a count, share a setting."""

from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.collectives.base import Op


def allreduce(value: Any, name: str | None = None, op: Op | int | str = Op.AVERAGE) -> np.ndarray:
    """Combines a number, array or tensor over all ranks.

    Args:
        value: The same shape and dtype on all ranks.
        name: Accepted for Horovod's sake; operations are matched by their order.
        op: `hvd.Average` (default), `hvd.Sum`, `hvd.Min`, `hvd.Max` or `hvd.Product`.

    Returns:
        NumPy array of the shape and dtype of `value`, the same on all ranks.

    Raises:
        TypeError: If the dtype cannot be reduced this way.
        MismatchError: On every rank, if the ranks do not call this alike.
    """
    return runtime.engine().allreduce(_value(value, "allreduce"), op)


def allgather(value: Any, name: str | None = None) -> np.ndarray:
    """Joins the arrays or tensors of all ranks along the first dimension, which may differ between ranks.

    Args:
        value: Array of shape (any, ...), or a number, which counts as shape (1,).
        name: Accepted for Horovod's sake.

    Returns:
        NumPy array of shape (sum of first dimensions, ...), in the order of the ranks.

    Raises:
        MismatchError: On every rank, if dtypes or later dimensions differ.
    """
    return runtime.engine().allgather(_value(value, "allgather"))


def broadcast(value: Any, root_rank: int, name: str | None = None) -> np.ndarray:
    """Returns the value of one rank on all ranks.

    Args:
        value: The same shape and dtype on all ranks.
        root_rank: The rank whose value all receive.
        name: Accepted for Horovod's sake.

    Returns:
        NumPy array with the values of `root_rank`.

    Raises:
        ValueError: If there is no such rank.
        MismatchError: On every rank, if shapes or dtypes differ.
    """
    return runtime.engine().broadcast(_value(value, "broadcast"), root_rank)


def broadcast_object(value: Any = None, root_rank: int = 0) -> Any:
    """Returns the picklable object of `root_rank` on every rank, such as a dictionary of settings."""
    return runtime.engine().broadcast_object(value, root_rank)


def allgather_object(value: Any) -> list[Any]:
    """Returns the picklable objects of all ranks, in the order of the ranks, on every rank."""
    return runtime.engine().allgather_object(value)


def barrier() -> None:
    """Waits until every rank has come here."""
    runtime.engine().barrier()


def _value(value: Any, function: str) -> Any:
    if tf.is_symbolic_tensor(value):
        raise TypeError(
            f"hvd.{function} takes values: numbers, arrays, eager tensors. Received {value!r} inside a "
            "tf.function; call it outside, on the function's result."
        )
    return value if isinstance(value, np.ndarray) else np.asarray(value)
