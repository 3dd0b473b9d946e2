"""Provide differentiable collective operations on tensors, in a graph and eagerly."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.backends.tensorflow.argument_checks import refused
from hvdtrain.backends.tensorflow.compression import Compression, check_compressor
from hvdtrain.collectives.engine import Engine, Op
from hvdtrain.collectives.reduction import Reduction
from hvdtrain.runtime.process_sets import ProcessSet, engine_of, global_process_set
from hvdtrain.tensorflow.util import check_adasum, handle_average_backwards_compatibility


def allreduce(
    tensor: Any,
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: Op | int | str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
) -> Any:
    """Reduce a tensor over all ranks to its mean, sum, minimum, maximum or product, and return it on each rank.

    Its gradient is the incoming gradient, reduced in the same way. The API of this and the following
    functions is that of Horovod (https://horovod.readthedocs.io/en/stable/api.html#module-horovod.tensorflow).

    Args:
        tensor: Tensor, variable, array or number of the same shape and dtype on all ranks; or
            `tf.IndexedSlices`, whose rows are gathered instead.
        average: Deprecated: True for a mean, False for a sum. Use `op`.
        device_dense: Device of the result, such as "/gpu:0".
        device_sparse: Device of the result for `tf.IndexedSlices`.
        compression: How the tensor is compressed before it is sent: `hvd.Compression.none`, `fp16`, `bf16`.
        op: `hvd.Average` (default), `hvd.Sum`, `hvd.Adasum`, `hvd.Min`, `hvd.Max` or `hvd.Product`.
        prescale_factor: Factor before the reduction. Integers are scaled in float64 and rounded toward zero.
        postscale_factor: Factor after the reduction.
        name, ignore_name_scope: Ignored here and below; accepted for compatibility with Horovod. The order of calls
            identifies an operation.
        process_set: The ranks that take part.

    Returns:
        A tensor or `tf.IndexedSlices` like `tensor`, of the same shape and dtype.

    Raises:
        ValueError: If both `average` and `op` are given, or this rank is not in `process_set`.
        TypeError: If the dtype cannot be reduced this way.
        NotImplementedError: For a sparse tensor with scaling or with an `op` other than mean and sum, and for
            Adasum on a number of ranks that is not a power of two.
        MismatchError: On every rank, if the calls of the ranks differ; eagerly it is also a
            `tf.errors.FailedPreconditionError`.
    """
    op = handle_average_backwards_compatibility(op, average)
    reduction = Reduction(op, float(prescale_factor), float(postscale_factor))
    engine = _engine(process_set, op)
    check_compressor(compression)
    if isinstance(tensor, tf.IndexedSlices):
        with tf.device(device_sparse):
            return _sparse(engine, [tensor], reduction)[0]
    with tf.device(device_dense):
        small, context = compression.compress(tf.convert_to_tensor(tensor))
        return compression.decompress(differentiable.allreduce(engine, small, reduction), context)


def grouped_allreduce(
    tensors: Sequence[Any],
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: Op | int | str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
    name: str | None = None,
) -> list[Any]:
    """Reduce several tensors as `allreduce` does, with fewer operations.

    Args:
        tensors: Tensors or `tf.IndexedSlices`, the same list of shapes and dtypes on all ranks. All other arguments
            are those of `allreduce`.

    Returns:
        A list like `tensors`.

    Raises:
        Exception: As in `allreduce`.
    """
    op = handle_average_backwards_compatibility(op, average)
    reduction = Reduction(op, float(prescale_factor), float(postscale_factor))
    engine = _engine(process_set, op)
    sparse = [tensor for tensor in tensors if isinstance(tensor, tf.IndexedSlices)]
    dense = [tensor for tensor in tensors if not isinstance(tensor, tf.IndexedSlices)]
    with tf.device(device_sparse):
        of_sparse = iter(_sparse(engine, sparse, reduction))
    with tf.device(device_dense):
        of_dense = iter(_compressed(compression, dense, engine, reduction, differentiable.grouped_allreduce))
    return [next(of_sparse if isinstance(tensor, tf.IndexedSlices) else of_dense) for tensor in tensors]


def allgather(
    tensor: Any,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Concatenate the tensors of all ranks along the first dimension, in rank order.

    The gradient is the mean of the incoming gradients of all ranks, of which each rank takes its rows.

    Args:
        tensor: Tensor of any dtype but string; the first dimension may differ between ranks, the others may
            not. A scalar counts as one row.
        process_set: The ranks that take part.

    Returns:
        Tensor of shape (sum of first dimensions, ...).

    Raises:
        ValueError: If this rank is not in `process_set`.
        MismatchError: On every rank, if dtypes or later dimensions differ.
    """
    return grouped_allgather([tensor], process_set=process_set)[0]


def grouped_allgather(
    tensors: Sequence[Any],
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> list[Any]:
    """Gather a list of tensors, each as `allgather` does, and return a list."""
    return differentiable.allgather(
        _engine(process_set), [tf.convert_to_tensor(tensor) for tensor in tensors]
    )


def broadcast(
    tensor: Any,
    root_rank: int,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send the tensor of one rank to all ranks.

    The gradient on `root_rank` is the mean of the incoming gradients of all ranks, and zero on other ranks.

    Args:
        tensor: Tensor of any dtype but string, of the same shape on all ranks.
        root_rank: The rank whose values all ranks receive, numbered as in the global process set.
        process_set: The ranks that take part; `root_rank` is one of them.

    Returns:
        Tensor like `tensor`.

    Raises:
        ValueError: If there is no such rank, or this rank is not in `process_set`.
        MismatchError: On every rank, if shapes, dtypes or root ranks differ.
    """
    return differentiable.broadcast(_engine(process_set), [tf.convert_to_tensor(tensor)], root_rank)[0]


def alltoall(
    tensor: Any,
    splits: Any = None,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send some rows to each rank and receive rows from each. The gradient is sent back in the same way.

    Args:
        tensor: Tensor of any dtype but string; the first dimension may differ between ranks.
        splits: Number of rows for each rank, int32 of shape (size,). Rows beyond their sum are not sent. By
            default equal parts; then the first dimension must be divisible by the number of ranks.
        process_set: The ranks that take part.

    Returns:
        The received rows in the order of the sending ranks. With `splits`, a pair of these rows and an int32
        tensor: the number of rows from each rank.

    Raises:
        tf.errors.InvalidArgumentError: If `splits` is invalid; eagerly it is also a ValueError.
        MismatchError: On every rank, if dtypes or later dimensions differ.
    """
    engine, tensor = _engine(process_set), tf.convert_to_tensor(tensor)
    if splits is None:
        return differentiable.alltoall(engine, tensor)[0]
    if tf.is_tensor(splits) and splits.dtype != tf.int32:
        raise refused(f"alltoall: splits must be int32. Received a tensor of {splits.dtype.name}.")
    return differentiable.alltoall(engine, tensor, tf.convert_to_tensor(splits, tf.int32))


def reducescatter(
    tensor: Any,
    device_dense: str = "",
    compression: Any = Compression.none,
    op: Op | int | str = Op.AVERAGE,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    """Reduce a tensor over all ranks and return on each rank its part of the rows.

    The gradient gathers the incoming gradients of all ranks, times the factors, and times the number of ranks
    for a sum.

    Args:
        tensor: Tensor of at least one dimension, of the same shape and dtype on all ranks. If the first
            dimension is not divisible by the number of ranks, the first ranks get one row more.
        op: `hvd.Average` (default) or `hvd.Sum`. All other arguments are those of `allreduce`.

    Returns:
        The rows of this rank in the reduced tensor.

    Raises:
        tf.errors.InvalidArgumentError: For a scalar, or any other `op`; it is also a ValueError.
        MismatchError: On every rank, if the calls of the ranks differ.
    """
    return grouped_reducescatter(
        [tensor], device_dense, compression, op, process_set, prescale_factor, postscale_factor
    )[0]


def grouped_reducescatter(
    tensors: Sequence[Any],
    device_dense: str = "",
    compression: Any = Compression.none,
    op: Op | int | str = Op.AVERAGE,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Any]:
    """Reduce and scatter a list of tensors, each as `reducescatter` does, and return a list."""
    reduction = Reduction(Op.of(op), float(prescale_factor), float(postscale_factor))
    with tf.device(device_dense):
        return _compressed(
            compression, tensors, _engine(process_set), reduction, differentiable.reducescatter
        )


def join() -> Any:
    """Report that this rank has no more batches, and contribute zeros until no rank has any.

    Returns:
        The rank that joined last, as an int32 scalar.
    """
    return differentiable.join(_engine(global_process_set))


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait until every rank has called this."""
    differentiable.barrier(_engine(process_set))


def _engine(process_set: ProcessSet, op: Op = Op.SUM) -> Engine:
    try:
        engine = engine_of(process_set)
    except ValueError as error:
        raise refused(str(error)) from None
    check_adasum(engine, op)
    return engine


def _compressed(
    compression: Any, tensors: Sequence[Any], engine: Engine, reduction: Reduction, operation: Any
) -> list[Any]:
    check_compressor(compression)
    if not tensors:
        return []
    pairs = [compression.compress(tf.convert_to_tensor(tensor)) for tensor in tensors]
    results = operation(engine, [small for small, _ in pairs], reduction)
    return [
        compression.decompress(small, context) for small, (_, context) in zip(results, pairs, strict=True)
    ]


def _sparse(engine: Engine, slices: Sequence[Any], reduction: Reduction) -> list[Any]:
    """Gather the rows of sparse tensors. Their sum is the sum of the tensors."""
    if not slices:
        return []
    if reduction.op not in (Op.AVERAGE, Op.SUM) or reduction.scales:
        raise NotImplementedError(
            "For sparse tensors (tf.IndexedSlices) only a mean and a sum without scaling are possible. Received: "
            f"{reduction}. Pass tf.convert_to_tensor(...) of the tensor, or sparse_as_dense=True."
        )
    parts = [part for tensor in slices for part in (tensor.values, tensor.indices)]
    gathered = differentiable.allgather(engine, parts)
    divisor = engine.size if reduction.op is Op.AVERAGE else 1
    results = []
    for values, indices, tensor in zip(gathered[::2], gathered[1::2], slices, strict=True):
        scaled = tf.cast(values / divisor, values.dtype)
        results.append(tf.IndexedSlices(scaled, indices, tensor.dense_shape))
    return results
