"""Run collectives on TensorFlow's tensors, with gradients as in Horovod."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.backends.tensorflow.argument_checks import (
    check_root,
    checked_splits,
    equal_splits,
    rank_in_world,
    refused,
)
from hvdtrain.backends.tensorflow.host_calls import on_host
from hvdtrain.collectives.engine import Call, Engine, Op
from hvdtrain.collectives.reduction import Reduction, reduced


def allreduce(engine: Engine, tensor: Any, reduction: Reduction) -> Any:
    """Combine a tensor over all ranks; its gradient is the incoming one, combined in the same way.

    Args:
        engine: The engine of a process set.
        tensor: Tensor of the same shape and dtype on all its ranks.
        reduction: How to combine.

    Returns:
        Tensor like `tensor`.
    """

    def backward(_: Any) -> Callable:
        return lambda upstream: allreduce(engine, upstream, reduction)

    def reduce(array: np.ndarray) -> list[np.ndarray]:
        return [reduced(engine, reduction, "allreduce", [array], _allreduce_each)[0]]

    return _differentiable(engine, reduce, backward, [tensor], [tensor.shape])[0]


def grouped_allreduce(engine: Engine, tensors: Sequence[Any], reduction: Reduction) -> list[Any]:
    """Combine several tensors in one operation, each as `allreduce` does.

    Args:
        engine: The engine of a process set.
        tensors: Tensors of any shapes and dtypes, the same list on all its ranks.
        reduction: How to combine.

    Returns:
        A list of tensors like `tensors`.
    """

    def backward(_: Any) -> Callable:
        return lambda *upstream: grouped_allreduce(engine, upstream, reduction)

    def reduce(*arrays: np.ndarray) -> list[np.ndarray]:
        return reduced(engine, reduction, "grouped_allreduce", arrays, Engine.grouped_allreduce)

    return _differentiable(engine, reduce, backward, tensors, [tensor.shape for tensor in tensors])


def allgather(engine: Engine, tensors: Sequence[Any]) -> list[Any]:
    """Join tensors of all ranks along the first dimension; the gradient is this rank's rows of the mean.

    Args:
        engine: The engine of a process set.
        tensors: Tensors whose first dimensions may differ between ranks; a scalar counts as one row.

    Returns:
        A list of tensors of shape (sum of first dimensions, ...).
    """
    rows = [tf.reshape(tensor, [1]) if tensor.shape.rank == 0 else tensor for tensor in tensors]

    def backward(_: Any) -> Callable:
        def gradient(*upstream: Any) -> list[Any]:
            starts, ends = _place_of_rank(engine, tf.stack([tf.shape(tensor)[0] for tensor in rows]))
            mean = [allreduce(engine, grad, Reduction(Op.AVERAGE)) for grad in upstream]
            return [grad[starts[i] : ends[i]] for i, grad in enumerate(mean)]

        return gradient

    def gather(*arrays: np.ndarray) -> list[np.ndarray]:
        return [engine.allgather(array) for array in arrays]

    return _differentiable(engine, gather, backward, rows, [_any_rows(tensor) for tensor in rows])


def broadcast(engine: Engine, tensors: Sequence[Any], root_rank: int, call: Call | None = None) -> list[Any]:
    """Send the tensors of one rank to all; the gradient is the mean on `root_rank` and zero elsewhere.

    Args:
        engine: The engine of a process set.
        tensors: Tensors of the same shapes and dtypes on all its ranks.
        root_rank: Rank of the world, member of the set.
        call: The call that the ranks compare before anything is sent, if the tensors have names.

    Returns:
        A list of tensors like `tensors`.
    """
    check_root(engine, root_rank)
    is_root = rank_in_world(engine) == root_rank

    def backward(_: Any) -> Callable:
        def gradient(*upstream: Any) -> list[Any]:
            mean = [allreduce(engine, grad, Reduction(Op.AVERAGE)) for grad in upstream]
            with tf.control_dependencies(mean):  # every rank takes part, even if its result is not used
                return mean if is_root else [tf.identity(tf.zeros_like(grad)) for grad in mean]

        return gradient

    def send(*arrays: np.ndarray) -> list[np.ndarray]:
        if call is not None:
            engine.agree(call)
        return [engine.broadcast(array, root_rank) for array in arrays]

    return _differentiable(engine, send, backward, tensors, [tensor.shape for tensor in tensors])


def alltoall(engine: Engine, tensor: Any, splits: Any = None) -> tuple[Any, Any]:
    """Send a part of the rows to each rank; the gradient is sent back to where the rows came from.

    Args:
        engine: The engine of a process set.
        tensor: Tensor with at least one dimension.
        splits: int32 tensor of shape (size,): number of rows for each rank; rows beyond their sum are not sent. By
            default equal parts.

    Returns:
        The received rows, in the order of their senders, and an int32 tensor of shape (size,): number of
        rows from each.

    Raises:
        ArgumentError: If `splits` does not match the tensor. In a graph it is raised as InvalidArgumentError.
    """
    if tensor.shape.rank == 0:
        raise refused("alltoall: expected a tensor with at least one dimension. Received a scalar.")

    def backward(outputs: Sequence[Any]) -> Callable:
        def gradient(upstream: Any, _: Any = None) -> Any:
            back, _ = alltoall(engine, upstream, outputs[1])
            kept = tf.shape(tensor)[0] - tf.shape(back)[0]
            return tf.concat([back, tf.zeros(tf.concat([[kept], tf.shape(back)[1:]], 0), back.dtype)], 0)

        return gradient

    def exchange(array: np.ndarray, *given: np.ndarray) -> list[np.ndarray]:
        counts = checked_splits(engine, array, given[0]) if given else equal_splits(engine, array)
        return list(engine.alltoall(array[: sum(counts)], counts))

    given = [] if splits is None else [splits]
    shapes = [_any_rows(tensor), tf.TensorShape([engine.size])]
    received, counts = _differentiable(
        engine, exchange, backward, [tensor], shapes, extra=given, dtypes=[tensor.dtype, tf.int32]
    )
    return received, counts


def reducescatter(engine: Engine, tensors: Sequence[Any], reduction: Reduction) -> list[Any]:
    """Combine tensors and give each rank its rows; the gradient gathers the incoming gradients of all ranks.

    Args:
        engine: The engine of a process set.
        tensors: Tensors with at least one dimension. If it is not divisible, the first ranks get one row more.
        reduction: How to combine: by AVERAGE or SUM.

    Returns:
        A list of tensors of shape (this rank's rows, ...).

    Raises:
        ArgumentError: If a tensor has no dimension, or for any other operation.
    """
    if any(tensor.shape.rank == 0 for tensor in tensors):
        raise refused("reducescatter: expected a tensor with at least one dimension. Received a scalar.")
    if reduction.op not in (Op.AVERAGE, Op.SUM):
        raise refused(f"reducescatter: expected op Average or Sum. Received: {reduction.op.name.lower()}.")
    factor = reduction.prescale * reduction.postscale * (engine.size if reduction.op is Op.SUM else 1)

    def backward(_: Any) -> Callable:
        return lambda *upstream: [allgather(engine, [grad * factor])[0] for grad in upstream]

    def scatter(*arrays: np.ndarray) -> list[np.ndarray]:
        return reduced(engine, reduction, "reducescatter", arrays, _reducescatter_each)

    return _differentiable(
        engine, scatter, backward, tensors, [_rows_of_rank(engine, tensor.shape) for tensor in tensors]
    )


def join(engine: Engine) -> Any:
    """Send zeros for this rank until all have joined; return the last rank to join as an int32 scalar."""
    (last,) = on_host(engine, lambda: [np.array(engine.join(), np.int32)], [], [tf.int32])
    last.set_shape(())
    return last


def barrier(engine: Engine) -> None:
    """Wait until every rank has called this."""

    def wait() -> list[np.ndarray]:
        engine.barrier()
        return [np.array(True)]

    on_host(engine, wait, [], [tf.bool])


def _differentiable(
    engine: Engine,
    function: Callable[..., list[np.ndarray]],
    backward: Callable[[Sequence[Any]], Callable],
    tensors: Sequence[Any],
    shapes: Sequence[Any],
    extra: Sequence[Any] = (),
    dtypes: Sequence[Any] | None = None,
) -> list[Any]:
    """Run a function of arrays on tensors.

    Args:
        engine: The engine, which orders the calls and stores errors.
        function: Takes the arrays of `tensors` and `extra`, and returns a list of arrays.
        backward: Takes the outputs and returns a function from incoming gradients to the gradients of `tensors`.
        tensors: Inputs with gradients.
        shapes: Static shapes of the outputs, which may be partially unknown.
        extra: Further inputs, without gradients.
        dtypes: Dtypes of the outputs; those of `tensors` by default.

    Returns:
        The outputs.
    """

    @tf.custom_gradient
    def forward(*inputs: Any) -> tuple[Any, Callable]:
        outputs = on_host(
            engine, function, [*inputs, *extra], list(dtypes or [tensor.dtype for tensor in inputs])
        )
        for output, shape in zip(outputs, shapes, strict=True):
            output.set_shape(shape)
        gradient = backward(outputs)

        def with_dense_gradients(*upstream: Any) -> Any:
            return gradient(*(grad if grad is None else tf.convert_to_tensor(grad) for grad in upstream))

        return tuple(outputs), with_dense_gradients

    return list(forward(*tensors)) if tensors else []


def _allreduce_each(engine: Engine, arrays: Sequence[np.ndarray], op: Op) -> list[np.ndarray]:
    return [engine.allreduce(array, op) for array in arrays]


def _reducescatter_each(engine: Engine, arrays: Sequence[np.ndarray], op: Op) -> list[np.ndarray]:
    return [engine.reducescatter(array, op) for array in arrays]


def _place_of_rank(engine: Engine, counts: Any) -> list[Any]:
    """Return the indices at which this rank's rows start and end in joined tensors."""

    def place(own: np.ndarray) -> list[np.ndarray]:
        counts_of_ranks = np.zeros((engine.size, len(own)), np.int32)
        counts_of_ranks[engine.rank] = own
        ends = engine.allreduce(counts_of_ranks, Op.SUM).cumsum(axis=0, dtype=np.int32)[engine.rank]
        return [ends - own, ends]

    return on_host(engine, place, [counts], [tf.int32, tf.int32])


def _any_rows(tensor: Any) -> tf.TensorShape:
    return tf.TensorShape([None]).concatenate(tensor.shape[1:])


def _rows_of_rank(engine: Engine, shape: tf.TensorShape) -> tf.TensorShape:
    """Return the shape of this rank's part, with its number of rows if that is known."""
    if shape.rank is None or shape[0] is None:
        return tf.TensorShape([None]).concatenate(shape[1:])
    rows = shape[0] // engine.size + (engine.rank < shape[0] % engine.size)
    return tf.TensorShape([rows]).concatenate(shape[1:])
