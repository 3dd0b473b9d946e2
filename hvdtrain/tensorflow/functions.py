"""Broadcast variables and Python objects, and gather Python objects."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
from hvdtrain.gradients.naming import described_call
from hvdtrain.gradients.trained_variables import NOTHING, registry
from hvdtrain.keras.collectives import allgather_object, broadcast_object  # noqa: F401 - also scripts' imports
from hvdtrain.runtime.process_sets import ProcessSet, engine_of, global_process_set

_INSTEAD = (
    "there are no global variables outside a graph of TensorFlow 1. Call hvd.broadcast_variables(model.variables, "
    "root_rank=0) and hvd.broadcast_variables(optimizer.variables, root_rank=0) instead, or give model.fit the "
    "callback hvd.callbacks.BroadcastGlobalVariablesCallback(0)."
)


def broadcast_variables(
    variables: Iterable[Any],
    root_rank: int,
    process_set: ProcessSet = global_process_set,
    inplace: bool = False,
) -> Any:
    """Copy the variables of one rank to all ranks, before the first step or after reading a checkpoint.

    Args:
        variables: Keras or TensorFlow variables, the same list on all ranks: `model.variables`,
            `optimizer.variables`.
        root_rank: The rank whose values all ranks receive, numbered as in the global process set.
        process_set: The ranks that take part.
        inplace: Ignored; accepted for compatibility with Horovod.

    Returns:
        None; in a graph of TensorFlow 1 the operation to run.

    Raises:
        ValueError: If there is no such rank, or this rank is not in `process_set`.
        MismatchError: On every rank, if the ranks hold other variables, shapes or dtypes.
    """
    assigned = _assigned(list(variables), root_rank, process_set)
    # Outside graphs of TensorFlow 1 the assignments run without a session.
    has_run = tf.executing_eagerly() or tf.compat.v1.get_default_graph().building_function
    return None if has_run else tf.group(*assigned)


def broadcast_(
    variables: Sequence[Any],
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[Any]:
    """Copy the variables of one rank to all ranks, and return the values as tensors.

    Args:
        variables: As for `broadcast_variables`, like the other arguments; dtypes may be mixed.
        name: Ignored here and below; accepted for compatibility with Horovod.

    Returns:
        A list of tensors with the new values of the variables.

    Raises:
        Exception: As in `broadcast_variables`.
    """
    assigned = _assigned(list(variables), root_rank, process_set)
    with tf.control_dependencies(assigned):
        return [tf.identity(variable) for variable in variables]


def broadcast_global_variables(root_rank: int) -> Any:
    """Return the operation that copies all global variables of a TensorFlow 1 graph from one rank to all ranks.

    Raises:
        RuntimeError: Outside such a graph; the message names the function to call instead.
    """
    if tf.executing_eagerly():
        raise RuntimeError(f"hvd.broadcast_global_variables: {_INSTEAD}")
    return broadcast_variables(tf.compat.v1.global_variables(), root_rank)


class BroadcastGlobalVariablesHook(tf.compat.v1.train.SessionRunHook):
    """A hook that copies all global variables from one rank when a `MonitoredSession` of TensorFlow 1 starts.

    Args:
        root_rank: The rank whose values all ranks receive.
        device: The device of the operation.

    Raises:
        RuntimeError: As `broadcast_global_variables`.
    """

    def __init__(self, root_rank: int, device: str = "") -> None:
        if tf.executing_eagerly():
            raise RuntimeError(f"hvd.BroadcastGlobalVariablesHook: {_INSTEAD}")
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        self.bcast_op: Any = None

    def begin(self) -> None:
        """Add the operation to the graph before the graph is finalized."""
        with tf.device(self.device):
            self.bcast_op = broadcast_global_variables(self.root_rank)

    def after_create_session(self, session: Any, coord: Any) -> None:
        """Run the operation."""
        session.run(self.bcast_op)


def broadcast_object_fn(
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Callable[[Any], Any]:
    """Return a function of one object that calls `broadcast_object` with these arguments."""
    return functools.partial(
        broadcast_object, root_rank=root_rank, session=session, name=name, process_set=process_set
    )


def _assigned(variables: Sequence[Any], root_rank: int, process_set: ProcessSet) -> list[Any]:
    engine = engine_of(process_set)
    if engine.size > 1:
        registry.note_broadcast(engine, TensorFlowBridge().readable(variables))
        if not variables:
            engine.warn(NOTHING)
    details = [f"{tf.as_dtype(variable.dtype).name} {tuple(variable.shape)}" for variable in variables]
    call = described_call(f"broadcast of variables from rank {root_rank}", variables, details)
    values = [tf.convert_to_tensor(variable) for variable in variables]
    received = differentiable.broadcast(engine, values, root_rank, call)
    assigned = [variable.assign(value) for variable, value in zip(variables, received, strict=True)]
    return [result for result in assigned if result is not None]
