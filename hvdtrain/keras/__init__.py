"""What a training script imports: `import hvdtrain.keras as hvd`."""

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
        f"hvdtrain.keras trains on Keras' TensorFlow backend; the backend here is {keras.backend.backend()}. "
        "Set KERAS_BACKEND=tensorflow, or change ~/.keras/keras.json."
    )

from hvdtrain.collectives.base import MismatchError, Op
from hvdtrain.keras import callbacks
from hvdtrain.keras.collectives import (
    allgather,
    allgather_object,
    allreduce,
    barrier,
    broadcast,
    broadcast_object,
)
from hvdtrain.keras.optimizer import DistributedOptimizer
from hvdtrain.keras.start import init
from hvdtrain.keras.variables import broadcast_variables
from hvdtrain.keras.world import (
    cross_rank,
    cross_size,
    is_homogeneous,
    local_rank,
    local_size,
    rank,
    size,
)
from hvdtrain.runtime import is_initialized, shutdown

Average, Sum, Min, Max, Product = Op.AVERAGE, Op.SUM, Op.MIN, Op.MAX, Op.PRODUCT

__all__ = [
    "Average",
    "DistributedOptimizer",
    "Max",
    "Min",
    "MismatchError",
    "Product",
    "Sum",
    "allgather",
    "allgather_object",
    "allreduce",
    "barrier",
    "broadcast",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "cross_rank",
    "cross_size",
    "init",
    "is_homogeneous",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "shutdown",
    "size",
]
