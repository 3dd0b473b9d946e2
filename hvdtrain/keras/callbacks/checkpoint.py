"""A training that can be stopped at any moment and goes on by itself, to the same result."""

import contextlib
import numbers
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from hvdtrain.keras.checkpointing.callback_order import flat
from hvdtrain.keras.checkpointing.session import Plan, Run


class Checkpoint(keras.callbacks.Callback):
    """Lets a training be killed at any moment: the same command goes on from the last checkpoint, by itself.

    `model.fit(hvd.shard((x, y), 256), callbacks=[hvd.callbacks.Checkpoint("checkpoints", every_minutes=10)])`

    The first rank writes, in the background, and each checkpoint appears whole or not at all. It holds weights,
    the optimizer's state, the state of callbacks (EarlyStopping, ReduceLROnPlateau, History, … and plain
    attributes of your own), the random numbers and metrics of every rank, epoch, step and the position in data of
    `hvd.shard`. With such data, the same number of ranks and operations that are deterministic, weights and history
    in the end are those of a run that was never stopped, to the bit. On another number of ranks it goes on with the
    same global batches. Of other data that are shuffled, the rest of an epoch comes in another order.

    When `hvdtrain run` passes on SIGUSR1 or SIGTERM, or the time that HVDTRAIN_DEADLINE names comes near, all ranks
    agree on a step, write a checkpoint and end with exit code 75.

    `step-000000311/model.weights.h5` is what `model.save_weights` writes; `model.load_weights` reads it without us.

    Args:
        directory: A folder for this training alone; with several hosts one that the first rank can always reach.
        every_steps: Writes after every so many steps.
        every_minutes: Writes after so many minutes. Without either, after each epoch; at the end in any case.
        keep: How many checkpoints stay.

    Raises:
        ValueError: If an argument is not positive. By `fit`, on every rank: if the checkpoint is of another model,
            or of other steps an epoch.
        TypeError: If an argument is of another kind.
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
        self.plan = Plan(
            _path(directory),
            None if every_steps is None else _counted(every_steps, "every_steps"),
            None if every_minutes is None else _positive(every_minutes),
            _counted(keep, "keep"),
        )
        self._run: Run | None = None
        self._ended = False

    @contextlib.contextmanager
    def over(self, model: keras.Model, given: dict[str, Any]) -> Iterator[None]:
        """Last as long as a `fit`: finds what to go on from, and leaves everything as it was.

        Args:
            model: The model that is fitted.
            given: The arguments of `fit`, among which the callbacks are put in order.
        """
        run = Run(self.plan, self, model, given)
        self._run = run
        try:
            run.open(self._ended)
            yield
            self._ended = True
        finally:
            self._run = None
            run.close()

    def on_train_begin(self, logs: Any = None) -> None:
        """Listen for signals."""
        if self._run is None:
            raise RuntimeError("hvd.callbacks.Checkpoint needs hvd.init() before model.fit.")
        self._run.begin()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begin to count steps."""
        self._at_work.begin_epoch(epoch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Write a checkpoint, and stops, if it is time."""
        self._at_work.after_step(batch + 1)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Likewise; also if it was time at the epoch's last step."""
        self._at_work.after_epoch(epoch + 1)

    def on_train_end(self, logs: Any = None) -> None:
        """Write the last checkpoint, from which nothing is left to do."""
        self._at_work.finish()

    @property
    def _at_work(self) -> Run:
        assert self._run is not None
        return self._run


def over(model: keras.Model, given: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Return what a `fit` with these arguments takes place in: that of its `Checkpoint`, or nothing.

    Raises:
        ValueError: If there is more than one, or one beside `BackupAndRestore`.
    """
    callbacks = flat(given)
    found = [each for each in callbacks if isinstance(each, Checkpoint)]
    if len(found) > 1:
        raise ValueError("One model.fit takes one hvd.callbacks.Checkpoint. Received: several.")
    if found and any(isinstance(each, keras.callbacks.BackupAndRestore) for each in callbacks):
        raise ValueError(
            "Both hvd.callbacks.Checkpoint and BackupAndRestore would restore. Leave one of them out."
        )
    return found[0].over(model, given) if found else contextlib.nullcontext()


def _path(directory: Any) -> Path:
    """Make the folder one that stays the same when the script goes elsewhere."""
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
