"""Provide collectives on values and variables outside of a training step, for example to sum a count."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
from hvdtrain.backends.tensorflow.compression import Compression, check_compressor
from hvdtrain.collectives.agreement import root_index
from hvdtrain.collectives.engine import Op
from hvdtrain.gradients.naming import described_call
from hvdtrain.gradients.trained_variables import NOTHING, registry
from hvdtrain.runtime.process_sets import ProcessSet, engine_of, global_process_set


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: Op | int | str | None = None,
    compression: Any = Compression.none,
    process_set: ProcessSet = global_process_set,
) -> np.ndarray:
    """Combine a number, array or tensor over all ranks.

    Args:
        value: The same shape and dtype on all ranks.
        name: Accepted for compatibility with Horovod; operations are matched by their order.
        average: Older argument of Horovod: True for a mean, False for a sum. Use `op` instead.
        prescale_factor: Factor by which the value is multiplied before the reduction.
        postscale_factor: Factor by which the result is multiplied.
        op: `hvd.Average` (default), `hvd.Sum`, `hvd.Adasum`, `hvd.Min`, `hvd.Max` or `hvd.Product`.
        compression: `hvd.Compression.none` (default), `fp16` or `bf16`.
        process_set: The ranks that take part; only these call this.

    Returns:
        NumPy array of the shape and dtype of `value`, the same on all ranks.

    Raises:
        ValueError: If both `average` and `op` are given.
        TypeError: If the dtype cannot be reduced this way.
        MismatchError: On every rank, if the ranks call this with different arguments.
    """
    engine, array = engine_of(process_set), _to_array(value, "allreduce")
    check_compressor(compression)
    compressed, context = array, None
    if compression is not Compression.none:
        compressed, context = compression.compress(tf.convert_to_tensor(array))
    total = engine.allreduce(_scale(np.asarray(compressed), prescale_factor), _choose_op(op, average))
    if compression is not Compression.none:
        total = compression.decompress(tf.convert_to_tensor(total), context).numpy()
    return _scale(total, postscale_factor)


def allgather(
    value: Any, name: str | None = None, process_set: ProcessSet = global_process_set
) -> np.ndarray:
    """Concatenate the arrays or tensors of all ranks along the first dimension, which may differ between ranks.

    Args:
        value: Array of shape (any, ...), or a number, which is treated as an array of shape (1,).
        name: Accepted for compatibility with Horovod.
        process_set: The ranks that take part; only these call this.

    Returns:
        NumPy array of shape (sum of first dimensions, ...), in the order of the ranks.

    Raises:
        MismatchError: On every rank, if dtypes or later dimensions differ.
    """
    return engine_of(process_set).allgather(_to_array(value, "allgather"))


def broadcast(
    value: Any, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> np.ndarray:
    """Return the value of one rank on all ranks.

    Args:
        value: The same shape and dtype on all ranks.
        root_rank: The rank whose value all ranks receive.
        name: Accepted for compatibility with Horovod.
        process_set: The ranks that take part; only these call this.

    Returns:
        NumPy array with the values of `root_rank`.

    Raises:
        ValueError: If there is no such rank.
        MismatchError: On every rank, if shapes or dtypes differ.
    """
    return engine_of(process_set).broadcast(_to_array(value, "broadcast"), root_rank)


def reducescatter(
    value: Any,
    name: str | None = None,
    op: Op | int | str = Op.AVERAGE,
    process_set: ProcessSet = global_process_set,
) -> np.ndarray:
    """Combine an array or tensor over all ranks, and return this rank's part of the rows.

    Args:
        value: The same shape and dtype on all ranks, with at least one dimension. If the number of
            rows is not a multiple of the number of ranks, the first ranks get one row more.
        name: Accepted for compatibility with Horovod.
        op: `hvd.Average` (default), `hvd.Sum`, `hvd.Min`, `hvd.Max` or `hvd.Product`.
        process_set: The ranks that take part; only these call this.

    Returns:
        NumPy array: this rank's rows of the combined array.

    Raises:
        ValueError: If `value` has no dimension.
        TypeError: If the dtype cannot be reduced this way.
        MismatchError: On every rank, if the ranks call this with different arguments.
    """
    return engine_of(process_set).reducescatter(_to_array(value, "reducescatter"), op)


def broadcast_object(
    obj: Any = None,
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return the picklable object of `root_rank` on every rank, such as a dictionary of settings."""
    return engine_of(process_set).broadcast_object(obj, root_rank)


def allgather_object(
    obj: Any, session: Any = None, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Any]:
    """Return the picklable objects of all ranks, in the order of the ranks, on every rank."""
    return engine_of(process_set).allgather_object(obj)


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait until every rank has called this."""
    engine_of(process_set).barrier()


def broadcast_variables(
    variables: Sequence[Any],
    root_rank: int = 0,
    process_set: ProcessSet = global_process_set,
    inplace: bool = False,
) -> None:
    """Set the variables of all ranks to the values of one rank; for custom training loops.

    Args:
        variables: Keras or TensorFlow variables, the same list on all ranks: `model.weights`,
            `optimizer.variables`.
        root_rank: The rank whose values are copied.
        process_set: The ranks that take part; only these call this.
        inplace: Accepted for compatibility with Horovod; variables are always assigned in place.

    Raises:
        ValueError: If there is no such rank, or `hvd.init()` was not called.
        MismatchError: On every rank, if the variables, shapes or dtypes differ between the ranks.
    """
    engine = engine_of(process_set)
    root = root_index(engine.ranks, root_rank, "broadcast_variables")
    if engine.size > 1 and not variables:
        engine.warn(NOTHING)
    details = [f"{variable.dtype} {tuple(variable.shape)}" for variable in variables]
    engine.agree(described_call("broadcast of variables", variables, details, weights_only=False))
    for variable in variables:
        value = engine.broadcast(np.asarray(variable.numpy()), root_rank)
        if engine.rank != root:
            variable.assign(value)
    if engine.size > 1:
        registry.note_broadcast(engine, TensorFlowBridge().readable(variables))


def broadcast_global_variables(root_rank: int) -> None:
    """Raise an error that names the replacement: TensorFlow 2 has no list of all variables to broadcast.

    Raises:
        RuntimeError: Always, as in Horovod with eager execution.
    """
    raise RuntimeError(
        "broadcast_global_variables is for TensorFlow 1, whose graph listed its variables. Give model.fit the "
        f"callback hvd.callbacks.BroadcastGlobalVariablesCallback({root_rank}), or call "
        f"hvd.broadcast_variables(model.weights, root_rank={root_rank}) before the first step."
    )


def _choose_op(op: Op | int | str | None, average: bool | None) -> Op:
    """Return the operation, which Horovod accepts in two arguments."""
    if op is not None and average is not None:
        raise ValueError(
            f"Give either op or the older argument average, not both. Received: op={op!r}, average={average!r}."
        )
    if op is not None:
        return Op.of(op)
    return Op.SUM if average is False else Op.AVERAGE


def _scale(array: np.ndarray, factor: float) -> np.ndarray:
    """Multiply an array by a factor; integers are multiplied in float64 and truncated, as in Horovod."""
    if factor == 1.0:
        return array
    wide = array if array.dtype.kind == "f" else array.astype(np.float64)
    return (wide * factor).astype(array.dtype)


def _to_array(value: Any, function: str) -> Any:
    if tf.is_symbolic_tensor(value):
        raise TypeError(
            f"hvd.{function} takes values: numbers, arrays, eager tensors. Received {value!r} inside a "
            "tf.function; call it outside, on the function's result, or use hvdtrain.tensorflow."
        )
    return value if isinstance(value, np.ndarray) else np.asarray(value)
