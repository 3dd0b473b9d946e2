"""Restore a training from a checkpoint, before other callbacks and before the first new step."""

from collections.abc import Sequence
from typing import Any

import keras

from hvdtrain.data import global_batch
from hvdtrain.data.adapters import preceded
from hvdtrain.keras.callbacks.rank_zero import Forwarding
from hvdtrain.keras.checkpointing.checkpoint_files import Saved
from hvdtrain.keras.checkpointing.training_state import TrainingState, adjustable


class RestoreState(keras.callbacks.Callback):
    """Callback before all others that restores the state of the earlier run.

    The state is restored when the first epoch begins, after `on_train_begin` of all callbacks. If the earlier run
    stopped inside an epoch, the batches before that point are read but not trained on; then the state is restored
    again, because callbacks have seen the epoch begin twice.
    """

    def __init__(self, state: TrainingState) -> None:
        super().__init__()
        self._state = state
        self.saved: Saved | None = None  # the checkpoint to resume from; None to start from the beginning
        self.replaying = False  # whether the last batch was one that had been trained on before
        self._seen = 0
        self._begun = self._whole = False
        self._train: Any = None

    @property
    def already(self) -> int:
        """Number of steps of the first epoch that were done before."""
        return self.saved.place.step if self.saved else 0

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
        if self.saved is not None:
            self._whole = self._state.built
            self._state.restore(self.saved)
            if not self._whole:
                _set_rates(self.model, self.saved.facts["rates"])

    def on_train_end(self, logs: Any = None) -> None:
        """Restore the state if no epoch was left to train."""
        if self._begun or self.saved is None:
            return
        if not self._state.built:
            raise ValueError(
                f"Nothing is left to train after {self.saved.entry}, and its weights cannot be put into a model "
                "that is not built. Give the model a keras.Input, or call it on a batch before model.fit."
            )
        self._state.callbacks.begin()
        self._state.restore(self.saved)

    def replayed(self, steps: int) -> None:
        """Restore the state again after the last step that the earlier run had done."""
        if self.saved is not None and steps >= self.already:
            self._state.restore(self.saved)

    def _step(self, iterator: Any) -> Any:
        if self.saved is not None and not self._whole:
            self._build(iterator)
        self.replaying = self._seen < self.already
        if not self.replaying:
            return self._train(iterator)
        if self._seen == 0:
            self._build(iterator)
        self._seen += self.model.steps_per_execution
        return skipped_step(self.model, iterator)

    def _build(self, iterator: Any) -> None:
        """Build what `fit` would build in its first step, and restore the state of a model that was not built."""
        if not self._whole or self.model._compile_metrics is not None or self.model._compile_loss is not None:
            build_from(iterator, self.model)
        if self._whole:
            return
        self._whole = True
        rates = [float(optimizer.learning_rate) for optimizer in adjustable(self.model)]
        self._state.restore(self.saved)  # type: ignore[arg-type]
        # Callbacks have already set the rates of this epoch.
        _set_rates(self.model, rates)


def build_from(iterator: Any, model: keras.Model) -> None:
    """Build a model, its metrics and its losses for the batches of an iterator, as `fit` does in its first step."""
    model._symbolic_build(data_batch=global_batch.as_keras(iterator.element_spec))


def skipped_step(model: keras.Model, iterator: Any) -> dict[str, Any]:
    """Read the batches of a step without training on them, and return the logs as they are."""
    for _ in range(model.steps_per_execution):
        next(iterator, None)
    return model.get_metrics_result()


def in_order(model: keras.Model, callbacks: Any, first: RestoreState, last: keras.callbacks.Callback) -> Any:
    """Return the callbacks of a `fit` with `first` before all and `last` after all, including History."""
    ordered = preceded(model, callbacks, first)
    listed = ordered.callbacks if isinstance(ordered, keras.callbacks.CallbackList) else ordered
    listed[:] = [*(callback for callback in listed if callback is not last), last]
    return ordered


def keep_history(given: dict[str, Any]) -> None:
    """Add History to the callbacks, so that its state is saved; Keras would add it after all others."""
    callbacks = given.get("callbacks")
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        listed = _listed(callbacks)
        known = any(isinstance(callback, keras.callbacks.History) for callback in listed)
        given["callbacks"] = listed if known else [*listed, keras.callbacks.History()]


def flat(given: dict[str, Any]) -> list[Any]:
    """List the callbacks, in place of forwarding ones like `hvd.callbacks.distributed` those inside them."""
    return _unwrapped(_listed(given.get("callbacks")))


def steps_passed_over(given: dict[str, Any]) -> int:
    """Return the number of steps of the first epoch that an earlier run has done."""
    callbacks = _listed(given.get("callbacks"))
    return sum(callback.already for callback in callbacks if isinstance(callback, RestoreState))


def _unwrapped(callbacks: list[Any]) -> list[Any]:
    found: list[Any] = []
    for callback in callbacks:
        found += _unwrapped(callback.inner) if isinstance(callback, Forwarding) else [callback]
    return found


def _listed(callbacks: Any) -> list[Any]:
    inner = callbacks.callbacks if isinstance(callbacks, keras.callbacks.CallbackList) else callbacks
    return keras.tree.flatten(inner or [])


def _set_rates(model: keras.Model, rates: Sequence[float]) -> None:
    for optimizer, rate in zip(adjustable(model), rates, strict=False):
        optimizer.learning_rate = rate
