"""Call a callback of hvdtrain before those of the user, so that they read up-to-date state."""

from typing import Any

import keras

from hvdtrain import runtime


def preceded(model: keras.Model, callbacks: Any, first: keras.callbacks.Callback) -> Any:
    """Put a callback before those given to `fit`, and remove one of the same type from an earlier `fit`.

    Args:
        model: The model that is fitted.
        callbacks: The `callbacks` argument of `fit`: None, a callback, a list, or a `keras.callbacks.CallbackList`.
        first: The callback.

    Returns:
        The callbacks to pass to `fit` instead.
    """
    if not callbacks:
        return [first]
    if isinstance(callbacks, list | tuple):
        return [first, *callbacks]
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [first, callbacks]
    others = [callback for callback in callbacks.callbacks if not isinstance(callback, type(first))]
    callbacks.callbacks[:] = [first, *others]
    first.set_model(model)
    first.set_params(callbacks.params)
    return callbacks


class Follow(keras.callbacks.Callback):
    """Count steps for `data.state()` of sharded data, and report losses that do not add up over ranks.

    Args:
        data: The result of `hvd.shard`.
        losses: The `Losses` of the model; None on one rank.
    """

    def __init__(self, data: Any, losses: Any = None) -> None:
        super().__init__()
        self._data, self._losses = data, losses
        self._reported = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start counting steps from 0."""
        self._data.position.done = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the steps whose batches were trained on."""
        self._data.position.done = batch + 1
        if not self._reported:
            self._report()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Report losses whose kind the first step could not determine."""
        self._report()

    def _report(self) -> None:
        self._reported = True
        if self._losses is not None:
            self._losses.report(runtime.engine())
