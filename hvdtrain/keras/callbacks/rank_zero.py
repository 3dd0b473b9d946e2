"""Run callbacks that write, print or send on rank 0 only."""

from typing import Any

import keras

from hvdtrain.keras.callbacks.forwarding import Forwarding
from hvdtrain.keras.callbacks.membership import writes

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
    def inner(self) -> list[Any]:
        """The callback."""
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
