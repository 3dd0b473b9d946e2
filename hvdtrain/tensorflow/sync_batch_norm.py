"""Names that scripts import from `horovod.tensorflow.sync_batch_norm`."""

from hvdtrain.keras.batch_normalization import SyncBatchNormalization

__all__ = ["SyncBatchNormalization"]
