"""Train with custom training loops on several ranks: `import hvdtrain.tensorflow as hvd`."""

import hvdtrain.keras  # noqa: F401 - checks the versions of TensorFlow and Keras
from hvdtrain.backends.tensorflow.compression import Compression
from hvdtrain.collectives.engine import MismatchError, Op
from hvdtrain.keras import elastic
from hvdtrain.keras.batch_normalization import SyncBatchNormalization
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
from hvdtrain.tensorflow import compression, mpi_ops, sync_batch_norm  # noqa: F401 - used as attributes of hvd
from hvdtrain.tensorflow.compatibility import (
    check_extension,
    check_num_rank_power_of_2,
    gpu_available,
    handle_average_backwards_compatibility,
    split_list,
)
from hvdtrain.tensorflow.functions import (
    BroadcastGlobalVariablesHook,
    allgather_object,
    broadcast_,
    broadcast_global_variables,
    broadcast_object,
    broadcast_object_fn,
    broadcast_variables,
)
from hvdtrain.tensorflow.gradient_aggregation import LocalGradientAggregationHelper
from hvdtrain.tensorflow.ops import (
    allgather,
    allreduce,
    alltoall,
    barrier,
    broadcast,
    grouped_allgather,
    grouped_allreduce,
    grouped_reducescatter,
    join,
    reducescatter,
)
from hvdtrain.tensorflow.optimizer import DistributedOptimizer
from hvdtrain.tensorflow.tape import DistributedGradientTape, PartialDistributedGradientTape
from hvdtrain.tensorflow.util import (  # noqa: F401 - private names that scripts import from here
    _executing_eagerly,
    _make_subgraph,
    refs_to_vars,
    vars_to_refs,
)
from hvdtrain.tensorflow.world import local_rank_op, local_size_op, process_set_included_op, rank_op, size_op
from hvdtrain.timeline.control import start_timeline, stop_timeline

Average, Sum, Adasum = Op.AVERAGE, Op.SUM, Op.ADASUM
Min, Max, Product = Op.MIN, Op.MAX, Op.PRODUCT

__all__ = [
    "Adasum",
    "Average",
    "BroadcastGlobalVariablesHook",
    "Compression",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "LocalGradientAggregationHelper",
    "Max",
    "Min",
    "MismatchError",
    "PartialDistributedGradientTape",
    "ProcessSet",
    "Product",
    "Sum",
    "SyncBatchNormalization",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_object_fn",
    "broadcast_variables",
    "ccl_built",
    "check_extension",
    "check_num_rank_power_of_2",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "gpu_available",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
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
    "process_set_included_op",
    "rank",
    "rank_op",
    "reducescatter",
    "refs_to_vars",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "size_op",
    "split_list",
    "start_timeline",
    "stop_timeline",
    "vars_to_refs",
]
