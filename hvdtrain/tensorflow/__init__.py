"""Train with custom training loops on several ranks: `import hvdtrain.tensorflow as hvd`."""

import hvdtrain.keras  # noqa: F401 - checks the versions of TensorFlow and Keras
from hvdtrain.backends.tensorflow.compression import Compression
from hvdtrain.collectives.engine import MismatchError
from hvdtrain.keras import elastic
from hvdtrain.keras.batch_normalization import SyncBatchNormalization
from hvdtrain.tensorflow import compression, mpi_ops, sync_batch_norm  # noqa: F401 - used as attributes of hvd
from hvdtrain.tensorflow.functions import (
    BroadcastGlobalVariablesHook,
    allgather_object,
    broadcast_global_variables,
    broadcast_object,
    broadcast_object_fn,
    broadcast_variables,
)
from hvdtrain.tensorflow.gradient_aggregation import LocalGradientAggregationHelper
from hvdtrain.tensorflow.mpi_ops import *  # noqa: F403 - the names in mpi_ops.__all__
from hvdtrain.tensorflow.ops import (
    allreduce,
    barrier,
    grouped_allreduce,
    grouped_reducescatter,
    reducescatter,
)
from hvdtrain.tensorflow.optimizer import DistributedOptimizer
from hvdtrain.tensorflow.tape import DistributedGradientTape, PartialDistributedGradientTape
from hvdtrain.tensorflow.util import (  # noqa: F401 - private names that scripts import from here
    _executing_eagerly,
    _make_subgraph,
    check_extension,
    refs_to_vars,
    split_list,
    vars_to_refs,
)

__all__ = [
    "BroadcastGlobalVariablesHook",
    "Compression",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "LocalGradientAggregationHelper",
    "MismatchError",
    "PartialDistributedGradientTape",
    "SyncBatchNormalization",
    "allgather_object",
    "allreduce",
    "barrier",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_object_fn",
    "broadcast_variables",
    "check_extension",
    "elastic",
    "grouped_allreduce",
    "grouped_reducescatter",
    "reducescatter",
    "refs_to_vars",
    "split_list",
    "vars_to_refs",
]
__all__ += mpi_ops.__all__
__all__.sort()
