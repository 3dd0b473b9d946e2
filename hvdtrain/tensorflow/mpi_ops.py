"""Names that scripts import from `horovod.tensorflow.mpi_ops`."""

from typing import Any

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
from hvdtrain.tensorflow.compatibility import (
    check_num_rank_power_of_2,
    gpu_available,
    handle_average_backwards_compatibility,
)
from hvdtrain.tensorflow.functions import broadcast_
from hvdtrain.tensorflow.ops import allgather, alltoall, broadcast, grouped_allgather, join
from hvdtrain.tensorflow.world import local_rank_op, local_size_op, process_set_included_op, rank_op, size_op
from hvdtrain.timeline.control import start_timeline, stop_timeline

num_rank_is_power_2 = check_num_rank_power_of_2
Average, Sum, Adasum = Op.AVERAGE, Op.SUM, Op.ADASUM
Min, Max, Product = Op.MIN, Op.MAX, Op.PRODUCT

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
    return ops.allreduce(
        tensor,
        op=op,
        process_set=process_set,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )


def _grouped_allreduce(
    tensors: Any,
    name: str | None = None,
    op: Op | int | str = Op.SUM,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    return ops.grouped_allreduce(
        tensors,
        op=op,
        process_set=process_set,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )


def _reducescatter(
    tensor: Any,
    name: str | None = None,
    op: Op | int | str = Op.SUM,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    return ops.reducescatter(
        tensor,
        op=op,
        process_set=process_set,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )


def _grouped_reducescatter(
    tensors: Any,
    name: str | None = None,
    op: Op | int | str = Op.SUM,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    return ops.grouped_reducescatter(
        tensors,
        op=op,
        process_set=process_set,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )
