"""Where this process stands, asked each time a graph runs instead of when it is built."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.collectives.engine import World

# Horovod's numbers for "not initialised" and "no such process set".
_NOT_INITIALIZED, _UNKNOWN_SET = -1, -3


def size_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """Return the number of ranks of a process set, by default of the world, as an int32 scalar tensor.

    Raises:
        ValueError: If `hvd.init()` was not called. In a graph it comes as InvalidArgumentError, when it runs.
    """

    def size() -> int:
        world = runtime.engine().size
        if process_set_id == 0:
            return world
        ranks, _ = runtime.engines_of_sets.get(process_set_id, (None, None))
        return _UNKNOWN_SET if ranks is None else len(ranks)

    return _at_run_time(size, name)


def rank_op(name: str | None = None) -> Any:
    """Return this process's rank as an int32 scalar tensor; raises as `size_op`."""
    return _at_run_time(lambda: _world().rank, name)


def local_rank_op(name: str | None = None) -> Any:
    """Return this process's number on its host as an int32 scalar tensor; raises as `size_op`."""
    return _at_run_time(lambda: _world().local_rank, name)


def local_size_op(name: str | None = None) -> Any:
    """Return the number of ranks on this host as an int32 scalar tensor; raises as `size_op`."""
    return _at_run_time(lambda: _world().local_size, name)


def process_set_included_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """Return whether this process belongs to a process set.

    Args:
        process_set_id: Number of the set; 0 is the world.
        name: Name of the result.

    Returns:
        int32 scalar tensor: 1 or 0; -1 if `hvd.init()` was not called, -3 if there is no such set.
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
