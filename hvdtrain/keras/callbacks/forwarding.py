"""Pass the events of a training on to other callbacks."""

from collections.abc import Callable
from typing import Any

import keras

HOOKS = (
    *("on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end"),
    *("on_train_batch_begin", "on_train_batch_end", "on_test_begin", "on_test_end"),
    *("on_test_batch_begin", "on_test_batch_end", "on_predict_begin", "on_predict_end"),
    *("on_predict_batch_begin", "on_predict_batch_end"),
)


class Forwarding(keras.callbacks.Callback):
    """Calls `forward` with each event: the name of the hook, and what Keras passed to it."""

    @property
    def inner(self) -> list[Any]:
        """The callbacks that receive the events."""
        raise NotImplementedError

    def forward(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Pass an event on."""
        raise NotImplementedError


def _forwards(hook: str) -> Callable[..., None]:
    def forward(self: Forwarding, *args: Any, **kwargs: Any) -> None:
        self.forward(hook, *args, **kwargs)

    return forward


for _hook in HOOKS:
    setattr(Forwarding, _hook, _forwards(_hook))
