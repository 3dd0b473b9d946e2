"""Divide the validation data of `fit` among the ranks."""

from typing import Any

import keras
import tensorflow as tf

from hvdtrain.data import structures
from hvdtrain.keras.dealt_batches import Arrays, dealt_data
from hvdtrain.keras.membership import engine_of

_METHOD = "evaluate"


class DivideValidation(keras.callbacks.Callback):
    """Validates on several ranks at once: arrays that are the same on all ranks are divided among them.

    The ranks get the batches of the validation in turn. The metrics of all ranks are combined, so the results are
    those of the whole data. Arrays that differ between the ranks are each rank's own part already, and are not
    divided. Use `hvd.shard` to divide other data. `hvd.callbacks.distributed` adds this callback.
    """

    def __init__(self) -> None:
        super().__init__()
        self._decided = False
        self._mine: Arrays | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Replace the `evaluate` that `fit` calls."""
        self.on_train_end()  # a fit that ended with an error has not called it
        if engine_of(self.model).size > 1:
            self.model.__dict__[_METHOD] = self._evaluate

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Restore the model's own `evaluate`."""
        self.model.__dict__.pop(_METHOD, None)
        self._decided, self._mine = False, None

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        evaluate = getattr(type(self.model), _METHOD)
        if not kwargs.get("_use_cached_eval_dataset"):  # called by the user
            return evaluate(self.model, *args, **kwargs)
        if not self._decided:
            self._decided, self._mine = True, self._part(kwargs)
        if self._mine is None:
            return evaluate(self.model, *args, **kwargs)
        del kwargs["_use_cached_eval_dataset"]
        kwargs.update(x=self._mine.as_x(), y=None, sample_weight=None, batch_size=None, steps=None)
        return evaluate(self.model, *args, **kwargs)

    def _part(self, given: dict[str, Any]) -> Arrays | None:
        """Return this rank's part of arrays; None unless all ranks have the same and enough of them."""
        engine = engine_of(self.model)
        parts = (given["x"], given.get("y"), given.get("sample_weight"))
        whole = checksums = None
        if all(
            hasattr(leaf, "__array__") and not isinstance(leaf, tf.RaggedTensor) for leaf in _leaves(parts)
        ):
            whole = dealt_data(parts, given["batch_size"], given["steps"], engine.size)
            assert isinstance(whole, Arrays)
            checksums = [whole.length, *(structures.checksum(leaf) for leaf in _leaves(whole.parts))]
        everyone = engine.allgather_object(checksums)
        same = all(other == everyone[0] for other in everyone)
        if whole is None or not same or not whole.enough(engine.size):
            return None
        part = whole.dealt(engine.rank, engine.size)
        assert isinstance(part, Arrays)
        return part


def _leaves(parts: Any) -> list[Any]:
    return [leaf for leaf in keras.tree.flatten(parts) if leaf is not None]
