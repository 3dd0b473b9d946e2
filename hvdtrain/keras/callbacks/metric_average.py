"""The logs of all ranks become one: means over all samples, not means of means."""

from typing import Any

import keras
import numpy as np

from hvdtrain import process_sets
from hvdtrain.collectives.base import Call
from hvdtrain.keras.callbacks.membership import process_set_of
from hvdtrain.process_sets import ProcessSet


class MetricAverageCallback(keras.callbacks.Callback):
    """Reports what all ranks saw together: each rank's metrics weigh as much as the samples it saw.

    At the end of each epoch the values in `logs` are replaced, on all ranks, by their mean over the ranks,
    weighted by samples. For loss, accuracy and every other mean over samples this is the value over all
    samples. For metrics that are not means of samples, such as AUC, it is an approximation.

    Put it before callbacks that read the logs (EarlyStopping, ReduceLROnPlateau, ModelCheckpoint).

    Args:
        device: Accepted for Horovod's sake.
        process_set: The ranks whose metrics belong together; by default those that train the model: the process
            set of its optimizer, or all.
    """

    def __init__(self, device: str = "", process_set: ProcessSet | None = None) -> None:
        super().__init__()
        self.device = device
        self.process_set = process_set
        self._trained = self._validated = 0.0
        self._batches = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Forgets the samples of the epoch before."""
        self._trained = self._validated = 0.0
        self._batches = 0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Counts batches, the weight where the model keeps no loss of its own."""
        self._batches += 1

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Notes the samples trained on before validation resets the counters."""
        self._trained = self._samples()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Notes the samples validated on."""
        self._validated = self._samples()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Replaces the values in `logs` by their means over the samples of all ranks.

        Raises:
            MismatchError: On every rank, if the ranks report different metrics.
        """
        engine = process_sets.engine_or_alone(self.process_set or process_set_of(self.model))
        if logs is None or engine.size == 1:
            return
        names = sorted(logs)
        engine.agree(Call("average of metrics", tuple(names)))
        trained = self._trained or self._samples()
        weights = np.array([self._validated if name.startswith("val_") else trained for name in names])
        values = np.array([float(logs[name]) for name in names])
        totals, seen = engine.grouped_allreduce([values * weights, weights], "sum")
        plain = engine.allreduce(values)
        for name, total, count, mean in zip(names, totals, seen, plain, strict=True):
            logs[name] = float(total / count) if count else float(mean)

    def _samples(self) -> float:
        """Returns how many samples the loss was averaged over since it was last reset."""
        loss = next((each for each in self.model.metrics if each.name == "loss"), None)
        count = getattr(loss, "count", None)
        return float(self._batches if count is None else count.numpy())
