"""A callback of ours before those of the user, so that what it knows is right when theirs are called."""

from typing import Any

import keras

from hvdtrain import runtime


def preceded(model: keras.Model, callbacks: Any, first: keras.callbacks.Callback) -> Any:
    """Puts a callback before those given to `fit`; one of its kind from an earlier `fit` goes.

    Args:
        model: The model that is fitted.
        callbacks: What `fit` was given: None, a callback, a list, or a `keras.callbacks.CallbackList`.
        first: The callback.

    Returns:
        What `fit` is to be given instead.
    """
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [first, *(callbacks if isinstance(callbacks, list | tuple) else [callbacks] * bool(callbacks))]
    others = [each for each in callbacks.callbacks if not isinstance(each, type(first))]
    callbacks.callbacks[:] = [first, *others]
    first.set_model(model)
    first.set_params(callbacks.params)
    return callbacks


class Follow(keras.callbacks.Callback):
    """Count steps for sharded data, so that callbacks may ask `data.state()`, and report losses that do not add up.

    Args:
        data: What `hvd.shard` returned.
        losses: What is known of the model's losses; None on one rank.
    """

    def __init__(self, data: Any, losses: Any = None) -> None:
        super().__init__()
        self._data, self._losses = data, losses
        self._reported = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begins to count."""
        self._data.position.done = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts the steps whose batches were trained on."""
        self._data.position.done = batch + 1
        if not self._reported:
            self._report()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Report losses that the first step could not tell."""
        self._report()

    def _report(self) -> None:
        self._reported = True
        if self._losses is not None:
            self._losses.report(runtime.engine())
