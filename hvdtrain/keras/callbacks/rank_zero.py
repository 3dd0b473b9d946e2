"""Run callbacks that write, print or send on rank 0 only."""

import math
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import keras

from hvdtrain.keras.membership import writes

# Callbacks of Keras that have effects outside of the training, and none on it.
_WRITERS = (
    "ModelCheckpoint",
    "OrbaxCheckpoint",
    "BackupAndRestore",
    "CSVLogger",
    "TensorBoard",
    "RemoteMonitor",
)
WRITERS = tuple(getattr(keras.callbacks, name) for name in _WRITERS if hasattr(keras.callbacks, name))
_HOOKS = (
    *("on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end"),
    *("on_train_batch_begin", "on_train_batch_end", "on_test_begin", "on_test_end"),
    *("on_test_batch_begin", "on_test_batch_end", "on_predict_begin", "on_predict_end"),
    *("on_predict_batch_begin", "on_predict_batch_end"),
)


class Forwarding(keras.callbacks.Callback):
    """Calls `forward` with each event.

    Attributes:
        inner: The callbacks that receive the events.
    """

    inner: list[Any]

    def forward(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Pass an event on: the name of the hook, and what Keras passed to it."""
        raise NotImplementedError


def _forwards(hook: str) -> Callable[..., None]:
    def forward(self: Forwarding, *args: Any, **kwargs: Any) -> None:
        self.forward(hook, *args, **kwargs)

    return forward


for _hook in _HOOKS:
    setattr(Forwarding, _hook, _forwards(_hook))


class RankZeroCallback(Forwarding):
    """Runs a callback on rank 0 only, so that a file is written once and a line printed once.

    On the other ranks the callback is never called. It must not change the training (weights, learning rate), which
    would then differ between the ranks, and must not communicate.

    `hvd.callbacks.distributed` wraps the callbacks of Keras that write. For a model trained on a process set, the
    set's first rank counts as rank 0.

    Args:
        callback: The callback.
    """

    def __init__(self, callback: keras.callbacks.Callback) -> None:
        super().__init__()
        self.callback = callback

    @property
    def inner(self) -> list[Any]:  # type: ignore[override]
        """The callback, as a list."""
        return [self.callback]

    def set_params(self, params: Any) -> None:
        """Pass the parameters of `fit` on."""
        super().set_params(params)
        self.callback.set_params(params)

    def set_model(self, model: Any) -> None:
        """Pass the model on, on rank 0."""
        super().set_model(model)
        if writes(model):
            self.callback.set_model(model)

    def forward(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Pass an event on, on rank 0."""
        if writes(self.model):
            getattr(self.callback, hook)(*args, **kwargs)


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Saves the best model of a training in one file, for any number of ranks.

    Rank 0 decides by the metrics it sees, and writes; the other ranks write nothing. Put
    `MetricAverageCallback` before it, so that the decision depends on the metrics of all ranks and is the same
    on all of them. It does not communicate, so it may be given to all ranks or, as in Horovod's scripts, to rank 0
    only. A new best model replaces the old one only when it is completely written. For a model trained on a process
    set, the set's first rank counts as rank 0.

    The API is Horovod's; the file format is that of Keras (see `keras.callbacks.ModelCheckpoint`).

    Args:
        monitor: Name of the metric in `logs`.
        verbose: 1 to print when a file is written.
        save_weights_only: True to save weights, to a path that ends in `.weights.h5`; False to save the model,
            to one that ends in `.keras` or `.h5`. `horovod.keras` has no such argument: a string in its position
            is used as `mode`, and the next argument as `save_freq`.
        mode: `"min"`, `"max"`, or `"auto"` to choose by the metric.
        save_freq: `"epoch"`, or the number of batches between two checks.
        filepath: Path of the file, which may contain `{epoch}` and names of metrics; also set later, as the
            attribute `filepath`.

    Raises:
        ValueError: When training starts, if `filepath` is not set or has another ending.
    """

    best: Any

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool | str = False,
        mode: str | int = "auto",
        save_freq: str | int = "epoch",
        *,
        filepath: Any = None,
    ) -> None:
        if isinstance(save_weights_only, str):
            given = mode if mode != "auto" else save_freq
            save_weights_only, mode, save_freq = False, save_weights_only, given
        super().__init__(
            "set-later.weights.h5" if save_weights_only else "set-later.keras",
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )
        self.filepath = filepath
        self.mode = getattr(self, "mode", mode)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check, before hours of training, that Keras can save to `filepath`."""
        endings = (".weights.h5",) if self.save_weights_only else (".keras", ".h5")
        if self.filepath is None or not str(self.filepath).endswith(endings):
            raise ValueError(
                f"BestModelCheckpoint needs a filepath that ends in {' or '.join(endings)}. Received: "
                f"filepath={self.filepath!r}. Set callback.filepath before model.fit, or pass filepath=."
            )
        self.filepath = str(self.filepath)
        if not writes(self.model):
            self.verbose = 0

    def _save_model(self, epoch: int, batch: int | None, logs: dict[str, Any] | None) -> None:
        if not self._is_best((logs or {}).get(self.monitor)) or not writes(self.model):
            return
        path = pathlib.Path(self._get_file_path(epoch, batch, logs))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".partial-{path.name}")
        (self.model.save_weights if self.save_weights_only else self.model.save)(partial)
        partial.replace(path)
        if self.verbose:
            print(
                f"\nEpoch {epoch + 1}: {self.monitor} improved to {self.best:.5f}; saved to {path}",
                flush=True,
            )

    def _is_best(self, value: Any) -> bool:
        """Return whether a value is the best so far; a NaN never is, because no value is better than a NaN."""
        if value is None:
            warnings.warn(
                f"BestModelCheckpoint saves nothing, because the logs have no {self.monitor!r}. Give model.fit "
                "validation_data, or monitor another metric.",
                stacklevel=2,
            )
            return False
        if math.isnan(value):
            return False
        if self.monitor_op is None:  # Keras sets it only at the end of an epoch, too late for save_freq=N
            self._set_monitor_op()
        better = self.best is None or bool(self.monitor_op(value, self.best))
        self.best = value if better else self.best
        return better
