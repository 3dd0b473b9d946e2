"""A callback of ours before those of the user, so that what it knows is right when theirs are called."""

from typing import Any

import keras


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
    """Counts steps for sharded data, so that callbacks may ask `data.state()`.

    Args:
        data: What `hvd.shard` returned.
    """

    def __init__(self, data: Any) -> None:
        super().__init__()
        self._data = data

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begins to count."""
        self._data.position.done = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts the steps whose batches were trained on."""
        self._data.position.done = batch + 1
