"""Return rank and size as tensors that are computed each time a graph runs, not when it is built."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.collectives.engine import World

# The values of Horovod for "not initialized" and "no such process set".
_NOT_INITIALIZED, _UNKNOWN_SET = -1, -3


def size_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """Return the number of ranks of a process set, by default the global one, as an int32 scalar tensor.

    Raises:
        ValueError: If `hvd.init()` was not called. In a graph this is an InvalidArgumentError when the graph runs.
    """

    def size() -> int:
        world = runtime.engine().size
        if process_set_id == 0:
            return world
        ranks, _ = runtime.engines_of_sets.get(process_set_id, (None, None))
        return _UNKNOWN_SET if ranks is None else len(ranks)

    return _at_run_time(size, name)


def rank_op(name: str | None = None) -> Any:
    """Return the rank of this process as an int32 scalar tensor; raise as `size_op` does."""
    return _at_run_time(lambda: _world().rank, name)


def local_rank_op(name: str | None = None) -> Any:
    """Return the local rank of this process as an int32 scalar tensor; raise as `size_op` does."""
    return _at_run_time(lambda: _world().local_rank, name)


def local_size_op(name: str | None = None) -> Any:
    """Return the number of ranks on this host as an int32 scalar tensor; raise as `size_op` does."""
    return _at_run_time(lambda: _world().local_size, name)


def process_set_included_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """Return whether this process belongs to a process set.

    Args:
        process_set_id: Number of the process set; 0 is the global one.
        name: Name of the resulting operation.

    Returns:
        int32 scalar tensor: 1 or 0; -1 if `hvd.init()` was not called, -3 if there is no such process set.
    """

    def included() -> int:
        if not runtime.is_initialized():
            return _NOT_INITIALIZED
        if process_set_id == 0:
            return 1
        ranks, _ = runtime.engines_of_sets.get(process_set_id, (None, None))
        return _UNKNOWN_SET if ranks is None else int(_world().rank in ranks)

    return _at_run_time(included, name)


def _world() -> World:
    return runtime.engine().world


def _at_run_time(number: Callable[[], int], name: str | None) -> Any:
    if tf.executing_eagerly():
        return tf.constant(number(), tf.int32)
    result = tf.numpy_function(lambda: np.array(number(), np.int32), [], tf.int32, name=name)
    result.set_shape(())
    return result
