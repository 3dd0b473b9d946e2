"""Collectives on TensorFlow's tensors that can be differentiated; how follows Horovod's conventions."""

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
from hvdtrain.collectives.scaling import Reduction, reduced


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
        return [reduced(engine, reduction, "allreduce", [array], _allreduced_one)[0]]

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

    return _differentiable(engine, reduce, backward, tensors, [each.shape for each in tensors])


def allgather(engine: Engine, tensors: Sequence[Any]) -> list[Any]:
    """Join tensors of all ranks along the first dimension; the gradient is this rank's rows of the mean.

    Args:
        engine: The engine of a process set.
        tensors: Tensors whose first dimensions may differ between ranks; a scalar counts as one row.

    Returns:
        A list of tensors of shape (sum of first dimensions, ...).
    """
    rows = [tf.reshape(each, [1]) if each.shape.rank == 0 else each for each in tensors]

    def backward(_: Any) -> Callable:
        def gradient(*upstream: Any) -> list[Any]:
            starts, ends = _place_of_rank(engine, tf.stack([tf.shape(each)[0] for each in rows]))
            mean = [allreduce(engine, each, Reduction(Op.AVERAGE)) for each in upstream]
            return [each[starts[i] : ends[i]] for i, each in enumerate(mean)]

        return gradient

    def gather(*arrays: np.ndarray) -> list[np.ndarray]:
        return [engine.allgather(each) for each in arrays]

    return _differentiable(engine, gather, backward, rows, [_any_rows(each) for each in rows])


def broadcast(engine: Engine, tensors: Sequence[Any], root_rank: int, call: Call | None = None) -> list[Any]:
    """Give all ranks the tensors of one; the gradient is the mean on `root_rank` and zero elsewhere.

    Args:
        engine: The engine of a process set.
        tensors: Tensors of the same shapes and dtypes on all its ranks.
        root_rank: Rank of the world, member of the set.
        call: What the ranks compare before anything is sent, where names can be told.

    Returns:
        A list of tensors like `tensors`.
    """
    check_root(engine, root_rank)
    is_root = rank_in_world(engine) == root_rank

    def backward(_: Any) -> Callable:
        def gradient(*upstream: Any) -> list[Any]:
            mean = [allreduce(engine, each, Reduction(Op.AVERAGE)) for each in upstream]
            with tf.control_dependencies(mean):  # every rank takes part, also where nobody needs the result
                return mean if is_root else [tf.identity(tf.zeros_like(each)) for each in mean]

        return gradient

    def send(*arrays: np.ndarray) -> list[np.ndarray]:
        if call is not None:
            engine.agree(call)
        return [engine.broadcast(each, root_rank) for each in arrays]

    return _differentiable(engine, send, backward, tensors, [each.shape for each in tensors])


def alltoall(engine: Engine, tensor: Any, splits: Any = None) -> tuple[Any, Any]:
    """Send a part of the rows to each rank; the gradient travels back the same ways.

    Args:
        engine: The engine of a process set.
        tensor: Tensor with at least one dimension.
        splits: int32 tensor of shape (size,): how many rows go to each rank. Rows beyond their sum stay. By
            default equal parts.

    Returns:
        The received rows, in the order of their senders, and an int32 tensor of shape (size,): how many came
        from each.

    Raises:
        ArgumentError: If `splits` does not fit the tensor. In a graph it comes as InvalidArgumentError.
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
    """Combine tensors and gives each rank its rows; the gradient gathers all ranks' incoming ones.

    Args:
        engine: The engine of a process set.
        tensors: Tensors with at least one dimension. The first ranks get one row more of what does not divide.
        reduction: How to combine: by AVERAGE or SUM.

    Returns:
        A list of tensors of shape (this rank's rows, ...).

    Raises:
        ArgumentError: If a tensor has no dimension, or for another operation than the two.
    """
    if any(each.shape.rank == 0 for each in tensors):
        raise refused("reducescatter: expected a tensor with at least one dimension. Received a scalar.")
    if reduction.op not in (Op.AVERAGE, Op.SUM):
        raise refused(f"reducescatter: expected op Average or Sum. Received: {reduction.op.name.lower()}.")
    factor = reduction.prescale * reduction.postscale * (engine.size if reduction.op is Op.SUM else 1)

    def backward(_: Any) -> Callable:
        return lambda *upstream: [allgather(engine, [each * factor])[0] for each in upstream]

    def scatter(*arrays: np.ndarray) -> list[np.ndarray]:
        return reduced(engine, reduction, "reducescatter", arrays, _scattered_each)

    return _differentiable(
        engine, scatter, backward, tensors, [_rows_left(engine, each.shape) for each in tensors]
    )


def join(engine: Engine) -> Any:
    """Send zeros for this rank until all have joined; returns the last of them as an int32 scalar."""
    (last,) = on_host(engine, lambda: [np.array(engine.join(), np.int32)], [], [tf.int32])
    last.set_shape(())
    return last


def barrier(engine: Engine) -> None:
    """Wait until every rank has come here."""

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
        engine: Orders the calls, and keeps errors.
        function: Takes the arrays of `tensors` and `extra`, and returns a list of arrays.
        backward: Takes the outputs and returns what turns incoming gradients into those of `tensors`.
        tensors: What may be differentiated.
        shapes: What is known of the outputs' shapes.
        extra: Further inputs, which have no gradient.
        dtypes: Dtypes of the outputs; those of `tensors` by default.

    Returns:
        The outputs.
    """

    @tf.custom_gradient
    def forward(*inputs: Any) -> tuple[Any, Callable]:
        outputs = on_host(
            engine, function, [*inputs, *extra], list(dtypes or [each.dtype for each in inputs])
        )
        for output, shape in zip(outputs, shapes, strict=True):
            output.set_shape(shape)
        gradient = backward(outputs)

        def of_dense(*upstream: Any) -> Any:
            return gradient(*(each if each is None else tf.convert_to_tensor(each) for each in upstream))

        return tuple(outputs), of_dense

    return list(forward(*tensors)) if tensors else []


def _allreduced_one(engine: Engine, arrays: Sequence[np.ndarray], op: Op) -> list[np.ndarray]:
    return [engine.allreduce(each, op) for each in arrays]


def _scattered_each(engine: Engine, arrays: Sequence[np.ndarray], op: Op) -> list[np.ndarray]:
    return [engine.reducescatter(each, op) for each in arrays]


def _place_of_rank(engine: Engine, counts: Any) -> list[Any]:
    """Return where, in joined tensors, this rank's rows start and end."""

    def place(mine: np.ndarray) -> list[np.ndarray]:
        every = np.zeros((engine.size, len(mine)), np.int32)
        every[engine.rank] = mine
        ends = engine.allreduce(every, Op.SUM).cumsum(axis=0, dtype=np.int32)[engine.rank]
        return [ends - mine, ends]

    return on_host(engine, place, [counts], [tf.int32, tf.int32])


def _any_rows(tensor: Any) -> tf.TensorShape:
    return tf.TensorShape([None]).concatenate(tensor.shape[1:])


def _rows_left(engine: Engine, shape: tf.TensorShape) -> tf.TensorShape:
    """Return the shape of this rank's part, with its number of rows where that is known."""
    if shape.rank is None or shape[0] is None:
        return tf.TensorShape([None]).concatenate(shape[1:])
    rows = shape[0] // engine.size + (engine.rank < shape[0] % engine.size)
    return tf.TensorShape([rows]).concatenate(shape[1:])
