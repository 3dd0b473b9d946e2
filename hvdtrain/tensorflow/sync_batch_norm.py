"""Names that scripts import from `horovod.tensorflow.sync_batch_norm`."""

from hvdtrain.keras.layers.sync_batch_norm import SyncBatchNormalization

__all__ = ["SyncBatchNormalization"]
