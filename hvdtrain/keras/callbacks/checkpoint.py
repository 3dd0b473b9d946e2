"""Write checkpoints from which the same command resumes training, with the same result."""

import contextlib
import numbers
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from hvdtrain.keras.checkpointing.restoring import flat
from hvdtrain.keras.checkpointing.session import CheckpointedFit, Settings


class Checkpoint(keras.callbacks.Callback):
    """Writes checkpoints, so that the same command resumes a training that was killed at any moment.

    `model.fit(hvd.shard((x, y), 256), callbacks=[hvd.callbacks.Checkpoint("checkpoints", every_minutes=10)])`

    The first rank writes in the background, and each checkpoint is complete or absent. It contains weights,
    the optimizer's state, the state of callbacks (EarlyStopping, ReduceLROnPlateau, History, … and plain
    attributes of custom callbacks), the random states and metrics of every rank, epoch, step and the position in
    data of `hvd.shard`. With such data, the same number of ranks and deterministic operations, the final weights
    and history equal those of a run that was never stopped, bit for bit. Another number of ranks continues with the
    same global batches. Other data that is shuffled has a different order in the rest of the epoch.

    When `hvdtrain run` passes on SIGUSR1 or SIGTERM, or shortly before the time in HVDTRAIN_DEADLINE, all ranks
    agree on a step, write a checkpoint and end with exit code 75.

    `step-000000311/model.weights.h5` is a file of `model.save_weights`; `model.load_weights` reads it without
    hvdtrain.

    Args:
        directory: A folder for this training only; with several hosts one that the first rank can always reach.
        every_steps: Number of steps between two checkpoints.
        every_minutes: Number of minutes between two checkpoints. Without both arguments one is written after each
            epoch. A checkpoint at the end of training is always written.
        keep: Number of checkpoints to keep.

    Raises:
        ValueError: If an argument is not positive. By `fit`, on every rank: if the checkpoint belongs to
            another model, or to another number of steps per epoch.
        TypeError: If an argument has another type.
        InUseError: By `fit`, on every rank, if another training uses the directory.
        Preempted: By `fit`, on every rank, if the training was asked to stop; Python exits with code 75.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep: int = 3,
    ) -> None:
        super().__init__()
        self._settings = Settings(
            _path(directory),
            None if every_steps is None else _counted(every_steps, "every_steps"),
            None if every_minutes is None else _positive(every_minutes),
            _counted(keep, "keep"),
        )
        self._run: Any = None
        self._ended = False

    @contextlib.contextmanager
    def over(self, model: keras.Model, given: dict[str, Any]) -> Iterator[None]:
        """Restore the last checkpoint before a `fit` with these arguments, and clean up after it."""
        run = self._run = CheckpointedFit(self._settings, self, model, given)
        try:
            run.open(self._ended)
            yield
            self._ended = True
        finally:
            self._run = None
            run.close()

    def on_train_begin(self, logs: Any = None) -> None:
        """Start listening for signals."""
        if self._run is None:
            raise RuntimeError("hvd.callbacks.Checkpoint needs hvd.init() before model.fit.")
        self._run.begin()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start counting the steps of the epoch."""
        self._run.begin_epoch(epoch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Write a checkpoint, and stop, if it is due."""
        self._run.after_step(batch + 1)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write a checkpoint, and stop, if it is due or was due at the epoch's last step."""
        self._run.after_epoch(epoch + 1)

    def on_train_end(self, logs: Any = None) -> None:
        """Write the last checkpoint, of the finished training."""
        self._run.finish()


def over(model: keras.Model, given: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Return the context manager for a `fit` with these arguments: that of its `Checkpoint`, or an empty one."""
    callbacks = flat(given)
    found = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
    if len(found) > 1:
        raise ValueError("One model.fit takes one hvd.callbacks.Checkpoint. Received: several.")
    if found and any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in callbacks):
        raise ValueError(
            "Both hvd.callbacks.Checkpoint and BackupAndRestore would restore. Leave one of them out."
        )
    return found[0].over(model, given) if found else contextlib.nullcontext()


def _path(directory: Any) -> Path:
    """Return the absolute path, which stays valid if the script changes its working directory."""
    if not isinstance(directory, str | os.PathLike) or isinstance(os.fspath(directory), bytes):
        raise TypeError(f"Checkpoint: directory must be a path. Received: directory={directory!r}.")
    return Path(directory).expanduser().absolute()


def _counted(number: Any, name: str) -> int:
    try:
        value = operator.index(number)
    except TypeError:
        value = None
    if value is None or isinstance(number, bool):
        raise TypeError(f"Checkpoint: {name} must be an integer. Received: {name}={number!r}.")
    if value < 1:
        raise ValueError(f"Checkpoint: {name} must be at least 1. Received: {name}={value}.")
    return value


def _positive(minutes: Any) -> float:
    if not isinstance(minutes, numbers.Real) or isinstance(minutes, bool):
        raise TypeError(f"Checkpoint: every_minutes must be a number. Received: every_minutes={minutes!r}.")
    if not float(minutes) > 0:
        raise ValueError(f"Checkpoint: every_minutes must be more than 0. Received: every_minutes={minutes}.")
    return float(minutes)
