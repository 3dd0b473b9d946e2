"""Compute the logs over the samples of all ranks, as one process would."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from hvdtrain.collectives.engine import Engine, ranks_text
from hvdtrain.keras.membership import process_set_of
from hvdtrain.keras.metrics.combining import average, exact_logs
from hvdtrain.keras.metrics.states import leaves, watch
from hvdtrain.runtime import process_sets
from hvdtrain.runtime.process_sets import ProcessSet

# The method of a model by which `fit` and `evaluate` compute their final logs.
_METHOD = "_get_metrics_result_or_logs"


class _LogsMethod:
    """Replacement of that method of a model; of several callbacks the last one added computes the logs."""

    def __init__(self, model: keras.Model) -> None:
        self._compute = getattr(model, _METHOD)
        self.callbacks: list[MetricAverageCallback] = []

    def __call__(self, logs: Any) -> Any:
        return self.callbacks[-1]._logs(self._compute, logs)


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
        self._first_non_finite: int | None = None
        self._start_epoch(0)

    def set_model(self, model: Any) -> None:
        """Start checking whether the states of custom metrics can be combined."""
        super().set_model(model)
        if self._engine.size > 1:
            watch(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Start computing the model's logs from all ranks."""
        self._training, self._told_non_finite = True, False
        self.model.__dict__.pop(_METHOD, None)  # left by a fit that ended with an error
        self._begin()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reset the counters of samples."""
        self._start_epoch(epoch)
        self._start_stage("training")

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count batches, and record the first whose logs are not finite."""
        self._batches = batch + 1
        if self._first_non_finite is None and not _finite(logs):
            self._first_non_finite = batch

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
            self._end()

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
        logs.update(average(self._engine, rest, "training", weights))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Restore the model's own method."""
        self._training = False
        self._end()

    @property
    def _engine(self) -> Engine:
        return process_sets.engine_or_alone(self.process_set or process_set_of(self.model))

    def _begin(self) -> None:
        """Replace the model's method by one that returns the logs of all ranks."""
        if self._engine.size > 1:
            self.model.__dict__.setdefault(_METHOD, _LogsMethod(self.model)).callbacks.append(self)

    def _end(self) -> None:
        """Undo `_begin`; without callbacks the model has its original method again."""
        method = self.model.__dict__.get(_METHOD)
        if method is not None and self in method.callbacks:
            method.callbacks.remove(self)
            if not method.callbacks:
                del self.model.__dict__[_METHOD]

    def _logs(self, compute: Callable[[Any], Any], logs: Any) -> Any:
        if not self._stage:
            return compute(logs)
        stage, engine = self._stage, self._engine
        exact = exact_logs(engine, self.model, logs, stage, self._samples())
        self._exact |= {f"val_{name}" if stage == "validation" else name for name in _names(exact)}
        if not _finite(exact) and not self._told_non_finite:
            self._told_non_finite = True
            self._tell_non_finite(engine, exact)
        found = _per_batch(self.model.metrics, self._batches, self._samples())
        if found and not self._told_per_batch:
            self._told_per_batch = True
            engine.say(
                f"{', '.join(found)} in the logs: the function returns one number for a batch, and its mean "
                "depends on how the samples are divided into batches. Return one number a sample, or write a "
                "keras.metrics.Metric that keeps sums."
            )
        return exact

    def _tell_non_finite(self, engine: Engine, logs: dict[str, Any]) -> None:
        """Print on which rank it began, since one step later the weights of all ranks are not finite."""
        everyone = engine.allgather_object(self._first_non_finite)
        known = [batch for batch in everyone if batch is not None]
        if not known:
            return
        first = [rank for rank, batch in zip(engine.ranks, everyone, strict=True) if batch == min(known)]
        names = ", ".join(name for name, value in logs.items() if not _finite(value))
        when = f"{self._stage} of epoch {self._epoch + 1}" if self._training else "evaluation"
        engine.say(
            f"{names} not finite (NaN or infinite) in the {when}, from batch {min(known) + 1} on, first on "
            f"{ranks_text(first)}."
        )

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._trained = self._validated = 0.0
        self._exact: set[str] = set()
        self._start_stage("")

    def _start_stage(self, stage: str) -> None:
        self._stage, self._batches = stage, 0
        self._first_non_finite = None

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
    """List the metrics whose function has returned one number for each of the batches, not one per sample."""
    names = []
    for metric in leaves(metrics):
        if not isinstance(metric, keras.metrics.MeanMetricWrapper):
            continue
        of_keras = getattr(metric._fn, "__module__", "").startswith("keras.")
        if not of_keras and float(metric.count.numpy()) == batches < samples:
            names.append(metric.name)
    return names
