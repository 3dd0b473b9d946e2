"""Compute the logs over the samples of all ranks, as one process would."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from hvdtrain.collectives.engine import Engine, ranks_text
from hvdtrain.keras.callbacks.membership import process_set_of
from hvdtrain.keras.metrics import logs as metric_logs
from hvdtrain.keras.metrics.additivity import watch
from hvdtrain.keras.metrics.states import leaves
from hvdtrain.runtime import process_sets
from hvdtrain.runtime.process_sets import ProcessSet


class _FirstNonFinite:
    """The first batch of a stage after which a value of this rank's logs was not finite."""

    def __init__(self) -> None:
        self._batch: int | None = None

    def note(self, batch: int, logs: Any) -> None:
        """Check the logs of a batch, and record the batch if a value is not finite."""
        if self._batch is None and not _finite(logs):
            self._batch = batch

    def tell(self, engine: Engine, logs: dict[str, Any], when: str) -> None:
        """Print on which rank it began, since one step later the weights of all ranks are not finite.

        Args:
            engine: The ranks. All call this.
            logs: The logs of all ranks, which are not finite.
            when: Epoch and stage.
        """
        everyone = engine.allgather_object(self._batch)
        known = [first_batch for first_batch in everyone if first_batch is not None]
        if not known:
            return
        first = [rank for rank, batch in zip(engine.ranks, everyone, strict=True) if batch == min(known)]
        names = ", ".join(name for name, value in logs.items() if not _finite(value))
        engine.say(
            f"{names} not finite (NaN or infinite) in the {when}, from batch {min(known) + 1} on, first on "
            f"{ranks_text(first)}."
        )


class MetricAverageCallback(keras.callbacks.Callback):
    """Reports loss and metrics over the samples of all ranks, not averages of averages.

    At the end of each epoch's training and of each validation the states of all metrics (sums and counts,
    confusion counts, AUC's buckets) are combined over the ranks, and the logs are computed from the combined
    states. All callbacks, `History` and the result of `evaluate` have the same values on all ranks. Values that an
    earlier callback has put into the logs are averaged. During an epoch each rank shows its own values.

    A custom metric is combined if its state adds up, or if it declares how to combine it: see `docs/metrics.md`.
    Put the callback before those that read the logs (EarlyStopping, ReduceLROnPlateau, ModelCheckpoint); or use
    `hvd.callbacks.distributed`, which does this.

    Args:
        device: Accepted for compatibility with Horovod; ignored.
        process_set: The ranks whose metrics belong together; by default those that train the model: the process
            set of its optimizer, or all.

    Raises:
        ValueError: On every rank, at the end of an epoch, if the state of a metric cannot be combined.
        MismatchError: On every rank, if the ranks report different metrics.
    """

    combines_ranks = True  # metrics of a model with this callback are those of all ranks

    def __init__(self, device: str = "", process_set: ProcessSet | None = None) -> None:
        super().__init__()
        self.device = device
        self.process_set = process_set
        self._training = self._told_non_finite = self._told_per_batch = False
        self._stage = ""
        self._start_epoch(0)

    def set_model(self, model: Any) -> None:
        """Start checking whether the states of custom metrics can be combined."""
        super().set_model(model)
        if self._engine.size > 1:
            watch(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Start computing the model's logs from all ranks."""
        self._training, self._told_non_finite = True, False
        self._begin(alone=True)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reset the counters of samples."""
        self._start_epoch(epoch)
        self._start_stage("training")

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count batches, and record the first whose logs are not finite."""
        self._batches = batch + 1
        self._first_non_finite.note(batch, logs)

    def on_test_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count batches, and record the first whose logs are not finite."""
        self.on_train_batch_end(batch, logs)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Record the number of training samples before validation resets the counters."""
        self._trained = self._samples()
        self._start_stage("validation")
        if not self._training:
            self._begin()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Record the number of validation samples."""
        self._validated = self._samples()
        self._stage = ""
        if not self._training:
            metric_logs.end(self.model, self)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Average the other values in `logs`, weighted by samples.

        Raises:
            MismatchError: On every rank, if the ranks report different metrics.
        """
        self._stage = ""
        if logs is None or self._engine.size == 1:
            return
        trained = self._trained or self._samples()
        rest = {name: value for name, value in logs.items() if name not in self._exact}
        weights = {name: self._validated if name.startswith("val_") else trained for name in rest}
        logs.update(metric_logs.average(self._engine, rest, "training", weights))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Restore the model's own method."""
        self._training = False
        metric_logs.end(self.model, self)

    def of_all_ranks(self, compute: Callable[[Any], Any], logs: Any) -> Any:
        """Return the logs of all ranks, in place of what Keras computes from this rank's samples."""
        if not self._stage:
            return compute(logs)
        stage, engine = self._stage, self._engine
        exact = metric_logs.exact(engine, self.model, logs, stage, self._samples())
        self._exact |= {f"val_{name}" if stage == "validation" else name for name in _names(exact)}
        self._say(engine, exact)
        return exact

    @property
    def _engine(self) -> Engine:
        return process_sets.engine_or_alone(self.process_set or process_set_of(self.model))

    def _begin(self, alone: bool = False) -> None:
        if self._engine.size > 1:
            metric_logs.begin(self.model, self, alone)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._trained = self._validated = 0.0
        self._exact: set[str] = set()
        self._start_stage("")

    def _start_stage(self, stage: str) -> None:
        self._stage, self._batches, self._first_non_finite = stage, 0, _FirstNonFinite()

    def _say(self, engine: Engine, logs: dict[str, Any]) -> None:
        """Warn once about logs that need an explanation; all ranks call this."""
        if not _finite(logs) and not self._told_non_finite:
            self._told_non_finite = True
            when = f"{self._stage} of epoch {self._epoch + 1}" if self._training else "evaluation"
            self._first_non_finite.tell(engine, logs, when)
        found = _per_batch(self.model.metrics, self._batches, self._samples())
        if found and not self._told_per_batch:
            self._told_per_batch = True
            engine.say(
                f"{', '.join(found)} in the logs: the function returns one number for a batch, and its mean "
                "depends on how the samples are divided into batches. Return one number a sample, or write a "
                "keras.metrics.Metric that keeps sums."
            )

    def _samples(self) -> float:
        """Return the number of samples that the loss was averaged over since its last reset."""
        loss = next((metric for metric in self.model.metrics if metric.name == "loss"), None)
        count = getattr(loss, "count", None)
        return float(self._batches if count is None else count.numpy())


def _names(logs: dict[str, Any]) -> list[str]:
    """List the names under which callbacks see logs: Keras flattens nested dicts."""
    names = []
    for name, value in logs.items():
        names += _names(value) if isinstance(value, dict) else [name]
    return names


def _finite(logs: Any) -> bool:
    """Return whether all numbers of a nest are finite."""
    return all(np.all(np.isfinite(value)) for value in keras.tree.flatten(logs or 0.0))


def _per_batch(metrics: Iterable[Any], batches: int, samples: float) -> list[str]:
    """List the metrics whose function has returned one number per batch, not one per sample.

    Args:
        metrics: Metrics at the end of a stage.
        batches: Number of batches in the stage.
        samples: Number of samples in the stage.
    """
    names = []
    for metric in leaves(metrics):
        if not isinstance(metric, keras.metrics.MeanMetricWrapper):
            continue
        of_keras = getattr(metric._fn, "__module__", "").startswith("keras.")
        if not of_keras and float(metric.count.numpy()) == batches < samples:
            names.append(metric.name)
    return names
