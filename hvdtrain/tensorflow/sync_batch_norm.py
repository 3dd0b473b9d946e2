"""Names that scripts import from `horovod.tensorflow.sync_batch_norm`."""

from hvdtrain.keras.layers import SyncBatchNormalization

__all__ = ["SyncBatchNormalization"]
