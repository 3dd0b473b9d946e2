"""Update an elastic state while `model.fit` runs."""

from collections.abc import Callable
from typing import Any

import keras

from hvdtrain.keras.checkpointing.restoring import build_from, skipped_step
from hvdtrain.keras.elastic.model_states import VariablesState
from hvdtrain.keras.elastic.state import State


class CommitStateCallback(keras.callbacks.Callback):
    """Commits the state after every `batches_per_commit` batches and at the end of each epoch.

    A commit costs a copy of the model and, under `elastic.run`, a write to disk: choose `batches_per_commit` so
    that this takes little time compared with the batches.

    Args:
        state: The state to commit.
        batches_per_commit: Number of batches from one commit to the next.
    """

    def __init__(self, state: State, batches_per_commit: int = 1) -> None:
        super().__init__()
        self.state = state
        self.batches_per_commit = batches_per_commit
        self.batches_remaining = batches_per_commit

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Start counting, so that all ranks commit after the same batches."""
        self.batches_remaining = self.batches_per_commit

    def on_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Commit after every `batches_per_commit` batches."""
        self.batches_remaining -= 1
        if self.batches_remaining == 0:
            self.batches_remaining = self.batches_per_commit
            self._commit()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Commit at the end of an epoch."""
        self._commit()

    def _commit(self) -> None:
        # While batches are skipped that were trained before, the state does not change.
        if getattr(self.state, "replaying", None) is not True:
            self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Stores the number of the last batch in `state.batch`, and skips batches that were trained already.

    At the end of an epoch `state.batch` is 0 again. When `model.fit` starts with a state that was restored in the
    middle of an epoch, the batches before the commit are read but not trained, so that the epoch continues with
    the next one: all callbacks see the batch numbers, and metrics continue, as in an uninterrupted run. If the
    data has the same order again (`shuffle=False`, or an order made from the epoch), the result is that of a run
    without interruption. `params["steps"]` of this callback is the number of remaining batches in the first epoch.

    With a state that has only attributes, or was set manually, `state.batch` batches are skipped.

    Args:
        state: The state to update; it has an attribute `batch`.
        skip_data: False if the data of `model.fit` already begins after the commit.
    """

    def __init__(self, state: Any, skip_data: bool = True) -> None:
        super().__init__()
        self.state = state
        self.skip_data = skip_data
        self.steps_per_epoch: int | None = None
        self._already = 0  # batches of this epoch that were trained before the commit
        self._seen = 0  # batches of this epoch that this `fit` has read

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Determine how many batches of the first epoch are done."""
        self.steps_per_epoch = None
        self._already = self._batches_done()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Set `params["steps"]` to the number of remaining batches in this epoch."""
        self._seen = 0
        params: dict[str, Any] = getattr(self, "params", None) or {}
        self.steps_per_epoch = self.steps_per_epoch or params.get("steps")
        if self.steps_per_epoch:
            self.params = {**params, "steps": self.steps_per_epoch - self._batches_done()}

    def on_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Replace the training function for this batch."""
        train = getattr(self.model, "train_function", None)
        if train is not None:
            self.model.train_function = lambda iterator: self._step(train, iterator)

    def on_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Record the batch."""
        if batch >= self._already:
            self.state.batch = batch

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Record that the epoch has ended and the next has not begun."""
        self.state.batch = self._already = 0
        self._note(None)

    def _batches_done(self) -> int:
        progress = self.state.progress if isinstance(self.state, VariablesState) else None
        if not isinstance(progress, tuple):
            return self.state.batch
        epoch, batches = progress
        return batches if epoch == getattr(self.state, "epoch", None) else 0

    def _step(self, train: Callable[[Any], Any], iterator: Any) -> Any:
        self.model.train_function = train
        self._seen += self.model.steps_per_execution
        if self._seen <= self._already:
            return self._skip(iterator)
        logs = train(iterator)
        # Record the progress before any callback can commit.
        self._note((getattr(self.state, "epoch", None), self._seen))
        return logs

    def _skip(self, iterator: Any) -> dict[str, Any]:
        """Skip a batch that was trained before the commit."""
        first = self._seen == self.model.steps_per_execution
        if first:
            # Otherwise fit would build its metrics in its first step, which is skipped.
            build_from(iterator, self.model)
        if isinstance(self.state, VariablesState):
            self.state.replaying = True
            if first:
                self.state.resume_metrics()
        return skipped_step(self.model, iterator) if self.skip_data else self.model.get_metrics_result()

    def _note(self, progress: tuple[Any, int] | None) -> None:
        if isinstance(self.state, VariablesState):
            self.state.progress = progress
            self.state.replaying = False


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Stores the number of finished epochs in `state.epoch`, over all restarts.

    It supports both ways to resume: `model.fit(initial_epoch=state.epoch, epochs=N)`, with which other callbacks
    see the right epoch numbers too, and Horovod's `model.fit(epochs=N - state.epoch)`, which counts from 0.

    Args:
        state: The state to update; it has an attribute `epoch`.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self.initial_epoch = state.epoch
        self._first: int | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Record the epoch from which this training resumes."""
        self.initial_epoch = self.state.epoch
        self._first = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Record the epoch number with which `model.fit` begins."""
        if self._first is None:
            self._first = epoch

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Count the epoch as finished."""
        self.state.epoch = self.initial_epoch + epoch - (self._first or 0) + 1
