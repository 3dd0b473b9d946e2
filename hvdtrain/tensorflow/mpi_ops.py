"""Names that scripts import from `horovod.tensorflow.mpi_ops`: ranks, their numbers in a graph, operations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.collectives.engine import Op
from hvdtrain.keras.world import (
    cross_rank,
    cross_size,
    init,
    is_homogeneous,
    local_rank,
    local_size,
    rank,
    size,
)
from hvdtrain.runtime import is_initialized, shutdown
from hvdtrain.runtime.build_info import (
    ccl_built,
    cuda_built,
    ddl_built,
    gloo_built,
    gloo_enabled,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rocm_built,
)
from hvdtrain.runtime.process_sets import ProcessSet, add_process_set, global_process_set, remove_process_set
from hvdtrain.tensorflow import ops
from hvdtrain.tensorflow.functions import broadcast_
from hvdtrain.tensorflow.ops import allgather, alltoall, broadcast, grouped_allgather, join
from hvdtrain.tensorflow.util import (
    check_num_rank_power_of_2,
    gpu_available,
    handle_average_backwards_compatibility,
)
from hvdtrain.timeline.control import start_timeline, stop_timeline

num_rank_is_power_2 = check_num_rank_power_of_2
Average, Sum, Adasum = Op.AVERAGE, Op.SUM, Op.ADASUM
Min, Max, Product = Op.MIN, Op.MAX, Op.PRODUCT

# All of these are also names of `hvdtrain.tensorflow`.
__all__ = [
    "Adasum",
    "Average",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "Sum",
    "add_process_set",
    "allgather",
    "alltoall",
    "broadcast",
    "broadcast_",
    "ccl_built",
    "check_num_rank_power_of_2",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "gpu_available",
    "grouped_allgather",
    "handle_average_backwards_compatibility",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_rank_op",
    "local_size",
    "local_size_op",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "num_rank_is_power_2",
    "process_set_included_op",
    "rank",
    "rank_op",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "size_op",
    "start_timeline",
    "stop_timeline",
]

# The values of Horovod for "not initialized" and "no such process set".
_NOT_INITIALIZED, _UNKNOWN_SET = -1, -3


def size_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """Return the number of ranks of a process set, by default the global one, as an int32 scalar tensor.

    It is computed each time a graph runs, not when it is built.

    Raises:
        ValueError: If `hvd.init()` was not called. In a graph this is an InvalidArgumentError when the graph runs.
    """

    def count() -> int:
        ranks = _ranks_of_set(process_set_id)
        return _UNKNOWN_SET if ranks is None else len(ranks)

    return _at_run_time(count, name)


def rank_op(name: str | None = None) -> Any:
    """Return the rank of this process as an int32 scalar tensor; raise as `size_op` does."""
    return _at_run_time(rank, name)


def local_rank_op(name: str | None = None) -> Any:
    """Return the local rank of this process as an int32 scalar tensor; raise as `size_op` does."""
    return _at_run_time(local_rank, name)


def local_size_op(name: str | None = None) -> Any:
    """Return the number of ranks on this host as an int32 scalar tensor; raise as `size_op` does."""
    return _at_run_time(local_size, name)


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
        ranks = _ranks_of_set(process_set_id)
        return _UNKNOWN_SET if ranks is None else int(rank() in ranks)

    return _at_run_time(included, name)


def _ranks_of_set(process_set_id: int) -> Any:
    """Return the ranks of a process set, None if there is no such set."""
    world = range(runtime.engine().size)
    ranks, _ = runtime.engines_of_sets.get(process_set_id, (None, None))
    return world if process_set_id == 0 else ranks


def _at_run_time(number: Callable[[], int], name: str | None) -> Any:
    if tf.executing_eagerly():
        return tf.constant(number(), tf.int32)
    result = tf.numpy_function(lambda: np.array(number(), np.int32), [], tf.int32, name=name)
    result.set_shape(())
    return result


# Layers copied from the examples of Horovod call these four functions. Their default is a sum, not a mean.


def _allreduce(
    tensor: Any,
    name: str | None = None,
    op: Op | int | str = Op.SUM,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    factors: dict[str, Any] = {"prescale_factor": prescale_factor, "postscale_factor": postscale_factor}
    return ops.allreduce(tensor, op=op, process_set=process_set, **factors)


def _grouped_allreduce(
    tensors: Any,
    name: str | None = None,
    op: Op | int | str = Op.SUM,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    factors: dict[str, Any] = {"prescale_factor": prescale_factor, "postscale_factor": postscale_factor}
    return ops.grouped_allreduce(tensors, op=op, process_set=process_set, **factors)


def _reducescatter(
    tensor: Any,
    name: str | None = None,
    op: Op | int | str = Op.SUM,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    factors = (prescale_factor, postscale_factor)
    return _grouped_reducescatter([tensor], name, op, ignore_name_scope, process_set, *factors)[0]


def _grouped_reducescatter(
    tensors: Any,
    name: str | None = None,
    op: Op | int | str = Op.SUM,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    factors: dict[str, Any] = {"prescale_factor": prescale_factor, "postscale_factor": postscale_factor}
    return ops.grouped_reducescatter(tensors, op=op, process_set=process_set, **factors)
