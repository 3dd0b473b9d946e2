"""Train Keras models on several ranks: `import hvdtrain.keras as hvd`."""

try:
    import keras
    import tensorflow  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"hvdtrain.keras needs TensorFlow 2.16 or newer and Keras 3 ({error}). On a cluster load its TensorFlow "
        "module; on a workstation: pip install 'hvdtrain[cpu]'"
    ) from error

if tuple(int(part) for part in keras.__version__.split(".")[:2]) < (3, 5):
    raise ImportError(
        f"hvdtrain.keras needs Keras 3.5 or newer; this is Keras {keras.__version__}. "
        "Type: pip install 'keras>=3.5', and unset TF_USE_LEGACY_KERAS if it is set."
    )

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"hvdtrain.keras needs the TensorFlow backend of Keras; the current backend is {keras.backend.backend()}. "
        "Set KERAS_BACKEND=tensorflow, or change ~/.keras/keras.json."
    )

from hvdtrain.backends.tensorflow.compression import Compression
from hvdtrain.collectives.engine import MismatchError, Op
from hvdtrain.data import first_on_node, first_overall, shard
from hvdtrain.keras import callbacks, elastic
from hvdtrain.keras.batch_normalization import SyncBatchNormalization
from hvdtrain.keras.checkpointing.load_model import load_model
from hvdtrain.keras.collectives import (
    allgather,
    allgather_object,
    allreduce,
    barrier,
    broadcast,
    broadcast_global_variables,
    broadcast_object,
    broadcast_variables,
    reducescatter,
)
from hvdtrain.keras.evaluation import evaluate, predict
from hvdtrain.keras.optimizer.averaging import DiLoCo, LocalSGD
from hvdtrain.keras.optimizer.distributed import DistributedOptimizer, PartialDistributedOptimizer
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
from hvdtrain.timeline.control import start_timeline, stop_timeline

Average, Sum, Adasum = Op.AVERAGE, Op.SUM, Op.ADASUM
Min, Max, Product = Op.MIN, Op.MAX, Op.PRODUCT

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "DiLoCo",
    "DistributedOptimizer",
    "LocalSGD",
    "Max",
    "Min",
    "MismatchError",
    "PartialDistributedOptimizer",
    "ProcessSet",
    "Product",
    "Sum",
    "SyncBatchNormalization",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "barrier",
    "broadcast",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "evaluate",
    "first_on_node",
    "first_overall",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "init",
    "is_homogeneous",
    "is_initialized",
    "load_model",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "predict",
    "rank",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "shard",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]
