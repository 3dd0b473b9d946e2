"""Collectives on tensors, in a graph as well as eagerly, through which a loss can be differentiated."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.backends.tensorflow.argument_checks import refused
from hvdtrain.collectives.engine import Engine, Op
from hvdtrain.collectives.scaling import Reduction
from hvdtrain.gradients.compression import Compression
from hvdtrain.runtime.process_sets import ProcessSet, engine_of, global_process_set
from hvdtrain.tensorflow.compatibility import check_adasum, handle_average_backwards_compatibility


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
    """Combine a tensor over all ranks, so that each has the mean, sum, least, greatest or product of all.

    Its gradient is the incoming gradient, combined in the same way. The API of this and the following
    functions is Horovod's (https://horovod.readthedocs.io/en/stable/api.html#module-horovod.tensorflow).

    Args:
        tensor: Tensor, variable, array or number of the same shape and dtype on all ranks; or
            `tf.IndexedSlices`, whose rows are gathered instead.
        average: Deprecated: True for a mean, False for a sum. Use `op`.
        device_dense: Device of the result, such as "/gpu:0".
        device_sparse: The same for `tf.IndexedSlices`.
        compression: What makes the tensor smaller while it travels: `hvd.Compression.none`, `fp16`, `bf16`.
        op: `hvd.Average` (default), `hvd.Sum`, `hvd.Adasum`, `hvd.Min`, `hvd.Max` or `hvd.Product`.
        prescale_factor: Factor before the reduction. Integers are scaled in float64 and cut off toward zero.
        postscale_factor: Factor after the reduction.
        name: Accepted for Horovod's sake, as everywhere below: operations are matched by their order.
        process_set: Which ranks take part.
        ignore_name_scope: Accepted for Horovod's sake.

    Returns:
        What `tensor` was, a tensor or `tf.IndexedSlices`, of the same shape and dtype.

    Raises:
        ValueError: If both `average` and `op` are given, or this rank is not in `process_set`.
        TypeError: If the dtype cannot be reduced this way.
        NotImplementedError: For a sparse tensor with scaling or with another `op` than mean and sum, and for
            Adasum on a number of ranks that is no power of two.
        MismatchError: On every rank, if the ranks do not call this alike; eagerly it is also a
            `tf.errors.FailedPreconditionError`.
    """
    op = handle_average_backwards_compatibility(op, average)
    reduction = Reduction(op, float(prescale_factor), float(postscale_factor))
    engine = _engine(process_set, op)
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
    """Combine several tensors at the price of few operations, each as `allreduce` does.

    Args:
        tensors: Tensors or `tf.IndexedSlices`, the same list of shapes and dtypes on all ranks.
        average: As for `allreduce`, and so are all that follow.
        device_dense: Device of the dense results.
        device_sparse: Device of the sparse results.
        compression: What makes the tensors smaller while they travel.
        op: The reduction.
        prescale_factor: Factor before it.
        postscale_factor: Factor after it.
        process_set: Which ranks take part.
        ignore_name_scope: Accepted for Horovod's sake.
        name: Accepted for Horovod's sake.

    Returns:
        A list like `tensors`.

    Raises:
        Exception: As `allreduce`.
    """
    op = handle_average_backwards_compatibility(op, average)
    reduction = Reduction(op, float(prescale_factor), float(postscale_factor))
    engine = _engine(process_set, op)
    sparse = [each for each in tensors if isinstance(each, tf.IndexedSlices)]
    dense = [each for each in tensors if not isinstance(each, tf.IndexedSlices)]
    with tf.device(device_sparse):
        of_sparse = iter(_sparse(engine, sparse, reduction))
    with tf.device(device_dense):
        of_dense = iter(_compressed(compression, dense, engine, reduction, differentiable.grouped_allreduce))
    return [next(of_sparse if isinstance(each, tf.IndexedSlices) else of_dense) for each in tensors]


def allgather(
    tensor: Any,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Join the tensors of all ranks along the first dimension, in the order of the ranks.

    The gradient is this rank's rows of the mean of all ranks' incoming gradients.

    Args:
        tensor: Tensor of any dtype but string; the first dimension may differ between ranks, the others may
            not. A scalar counts as one row.
        name: Accepted for Horovod's sake.
        ignore_name_scope: Accepted for Horovod's sake.
        process_set: Which ranks take part.

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
    """Join several tensors, each as `allgather` does; takes and returns a list."""
    return differentiable.allgather(_engine(process_set), [tf.convert_to_tensor(each) for each in tensors])


def broadcast(
    tensor: Any,
    root_rank: int,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Give every rank the tensor of one.

    The gradient is the mean of all ranks' incoming gradients on `root_rank`, and zero elsewhere.

    Args:
        tensor: Tensor of any dtype but string, of the same shape on all ranks.
        root_rank: The rank whose values all receive, as the whole world numbers it.
        name: Accepted for Horovod's sake.
        ignore_name_scope: Accepted for Horovod's sake.
        process_set: Which ranks take part; `root_rank` is one of them.

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
    """Send a part of the rows to each rank and receives a part from each. The gradient travels back.

    Args:
        tensor: Tensor of any dtype but string; the first dimension may differ between ranks.
        splits: How many rows go to each rank: int32, one for each. Rows beyond their sum are not sent. By
            default equal parts, for which the first dimension must divide by the number of ranks.
        name: Accepted for Horovod's sake.
        ignore_name_scope: Accepted for Horovod's sake.
        process_set: Which ranks take part.

    Returns:
        The received rows in the order of their senders. With `splits`, a pair of them and an int32 tensor: how
        many came from each rank.

    Raises:
        tf.errors.InvalidArgumentError: If `splits` does not fit; eagerly it is also a ValueError.
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
    """Combine a tensor over all ranks and gives each its part of the rows.

    The gradient gathers all ranks' incoming gradients, times the factors, and times the number of ranks for a
    sum.

    Args:
        tensor: Tensor of at least one dimension, of the same shape and dtype on all ranks. If the first
            dimension does not divide by the number of ranks, the first ranks get one row more.
        device_dense: Device of the result.
        compression: As for `allreduce`.
        op: `hvd.Average` (default) or `hvd.Sum`.
        name: Accepted for Horovod's sake.
        process_set: Which ranks take part.
        ignore_name_scope: Accepted for Horovod's sake.
        prescale_factor: Factor before the reduction, as for `allreduce`.
        postscale_factor: Factor after the reduction.

    Returns:
        This rank's rows of the combined tensor.

    Raises:
        tf.errors.InvalidArgumentError: For a scalar, or another `op`; it is also a ValueError.
        MismatchError: On every rank, if the ranks do not call this alike.
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
    """Combine and scatters several tensors, each as `reducescatter` does; takes and returns a list."""
    reduction = Reduction(Op.of(op), float(prescale_factor), float(postscale_factor))
    with tf.device(device_dense):
        return _compressed(
            compression, tensors, _engine(process_set), reduction, differentiable.reducescatter
        )


def join() -> Any:
    """Tells that this rank has no more batches, and waits until all have none; zeros are sent for it until then.

    Returns:
        int32 scalar: the rank that joined last.
    """
    return differentiable.join(_engine(global_process_set))


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait until every rank has come here."""
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
    if not tensors:
        return []
    pairs = [compression.compress(tf.convert_to_tensor(each)) for each in tensors]
    results = operation(engine, [small for small, _ in pairs], reduction)
    return [compression.decompress(each, context) for each, (_, context) in zip(results, pairs, strict=True)]


def _sparse(engine: Engine, slices: Sequence[Any], reduction: Reduction) -> list[Any]:
    """Gather the rows of sparse tensors: added up, they are the sum."""
    if not slices:
        return []
    if reduction.op not in (Op.AVERAGE, Op.SUM) or reduction.scales:
        raise NotImplementedError(
            "Of sparse tensors (tf.IndexedSlices) there are a mean and a sum without scaling. Received: "
            f"{reduction}. Pass tf.convert_to_tensor(...) of it, or sparse_as_dense=True."
        )
    parts = differentiable.allgather(
        engine, [part for each in slices for part in (each.values, each.indices)]
    )
    share = engine.size if reduction.op is Op.AVERAGE else 1
    return [
        tf.IndexedSlices(tf.cast(values / share, values.dtype), indices, each.dense_shape)
        for values, indices, each in zip(parts[::2], parts[1::2], slices, strict=True)
    ]
