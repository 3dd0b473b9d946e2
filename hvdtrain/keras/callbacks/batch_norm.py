"""Average the statistics of BatchNormalization over the ranks before validation and saving."""

from typing import Any

import keras
import numpy as np

from hvdtrain.collectives.engine import Call
from hvdtrain.keras.callbacks.membership import engine_of
from hvdtrain.keras.layers.sync_batch_norm import SyncBatchNormalization


class AverageBatchNormStatistics(keras.callbacks.Callback):
    """Averages BatchNormalization's moving statistics, so that all ranks validate and save the same model.

    In training each rank normalises by its own batch, so its moving mean and variance differ from those of other
    ranks. Before each validation, and at the end of each epoch before the callbacks that follow (put it first),
    they are replaced by the statistics of all ranks' samples: the mean of the means, and the variance around it,
    mean(variance + mean²) - mean². Frozen layers are not changed, nor is `hvd.SyncBatchNormalization`, whose
    statistics are the same on all ranks already. `hvd.callbacks.distributed` adds this callback.

    Args:
        save_freq: `"epoch"`, or a number of batches after which to average too, as for a `ModelCheckpoint` with
            the same `save_freq`.
    """

    def __init__(self, save_freq: str | int = "epoch") -> None:
        super().__init__()
        self.save_freq = save_freq
        self._differ = False
        self._seen = self._last = 0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Record that the statistics differ between ranks, and average every `save_freq` batches."""
        self._differ = True
        if self.save_freq == "epoch":
            return
        self._seen += batch - self._last if batch > self._last else batch + 1  # as ModelCheckpoint counts
        self._last = batch
        if self._seen >= int(self.save_freq):
            self._seen = 0
            self._average()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Average before a validation."""
        self._average()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Average before other callbacks save the model at the end of an epoch."""
        self._average()

    def _average(self) -> None:
        engine = engine_of(self.model)
        if engine.size == 1 or not self._differ:
            return
        self._differ = False
        layers = [layer for layer in self.model._flatten_layers() if _has_own_statistics(layer)]
        means = [layer.moving_mean.numpy().astype(np.float64) for layer in layers]
        squares = [
            layer.moving_variance.numpy().astype(np.float64) + mean**2
            for layer, mean in zip(layers, means, strict=True)
        ]
        call = Call(
            "statistics of BatchNormalization",
            tuple(f"{layer.name} {layer.moving_mean.shape}" for layer in layers),
        )
        both = engine.grouped_allreduce([*means, *squares], "average", call)
        for layer, mean, square in zip(layers, both, both[len(layers) :], strict=False):
            layer.moving_mean.assign(mean)
            layer.moving_variance.assign(np.maximum(square - mean**2, 0))


def _has_own_statistics(layer: Any) -> bool:
    normalises = isinstance(layer, keras.layers.BatchNormalization)
    return normalises and not isinstance(layer, SyncBatchNormalization) and layer.built and layer.trainable
