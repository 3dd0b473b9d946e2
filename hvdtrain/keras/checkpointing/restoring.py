"""Restore a training from a checkpoint, before other callbacks and before the first new step."""

from collections.abc import Sequence
from typing import Any

import keras

from hvdtrain.data import global_batch
from hvdtrain.keras.checkpointing.saved_state import Saved
from hvdtrain.keras.checkpointing.training_state import TrainingState, adjustable


class RestoreState(keras.callbacks.Callback):
    """Callback before all others that restores the state of the earlier run.

    The state is restored when the first epoch begins, after `on_train_begin` of all callbacks. If the earlier run
    stopped inside an epoch, the batches before that point are read but not trained on; then the state is restored
    again, because callbacks have seen the epoch begin twice.

    Args:
        state: The state of the training.
        saved: The checkpoint to resume from; None to start from the beginning.
    """

    def __init__(self, state: TrainingState, saved: Saved | None) -> None:
        super().__init__()
        self._state, self._saved = state, saved
        self.already = saved.place.step if saved else 0  # steps of the first epoch that were done before
        self._seen = 0
        self.replaying = False  # whether the last batch was one that had been trained on before
        self._begun = self._whole = False
        self._train: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Replace the model's training function, inside of the replacements of other callbacks."""
        self._train = self.model.train_function
        self.model.train_function = self._step

    def leave(self, model: Any) -> None:
        """Restore the model's training function."""
        if self._train is not None and model.train_function == self._step:
            model.train_function, self._train = self._train, None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Restore the state before the first epoch."""
        if self._begun:
            return
        self._begun = True
        self._state.callbacks.begin()
        if self._saved is not None:
            self._whole = self._state.built
            self._state.restore(self._saved)
            if not self._whole:
                _set_rates(self.model, self._saved.facts["rates"])

    def on_train_end(self, logs: Any = None) -> None:
        """Restore the state if no epoch was left to train."""
        if self._begun or self._saved is None:
            return
        if not self._state.built:
            raise ValueError(
                f"Nothing is left to train after {self._saved.entry}, and its weights cannot be put into a model "
                "that is not built. Give the model a keras.Input, or call it on a batch before model.fit."
            )
        self._state.callbacks.begin()
        self._state.restore(self._saved)

    def replayed(self, steps: int) -> None:
        """Restore the state again after the last step that the earlier run had done."""
        if self._saved is not None and steps >= self.already:
            self._state.restore(self._saved)

    def _step(self, iterator: Any) -> Any:
        steps = self.model.steps_per_execution
        if self._saved is not None and not self._whole:
            self._build(iterator)
        self.replaying = self._seen < self.already
        if not self.replaying:
            return self._train(iterator)
        if self._seen == 0:
            self._build(iterator)
        self._seen += steps
        for _ in range(steps):
            next(iterator, None)
        return self.model.get_metrics_result()

    def _build(self, iterator: Any) -> None:
        """Build what `fit` would build in its first step, and restore the state of a model that was not built."""
        if not self._whole or self.model._compile_metrics is not None or self.model._compile_loss is not None:
            self.model._symbolic_build(data_batch=global_batch.as_keras(iterator.element_spec))
        if self._whole:
            return
        self._whole = True
        rates = [float(optimizer.learning_rate) for optimizer in adjustable(self.model)]
        self._state.restore(self._saved)  # type: ignore[arg-type]
        # Callbacks have already set the rates of this epoch.
        _set_rates(self.model, rates)


def _set_rates(model: keras.Model, rates: Sequence[float]) -> None:
    for optimizer, rate in zip(adjustable(model), rates, strict=False):
        optimizer.learning_rate = rate
