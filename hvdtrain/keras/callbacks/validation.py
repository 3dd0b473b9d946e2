"""Divide the validation data of `fit` among the ranks."""

from typing import Any

import keras
import tensorflow as tf

from hvdtrain.data import structures
from hvdtrain.keras.callbacks.membership import engine_of
from hvdtrain.keras.dealt_batches import Arrays, DealtData, dealt_data

_METHOD = "evaluate"
_NO_OTHER_DATA = dict.fromkeys(("y", "sample_weight", "batch_size", "steps"))


class DivideValidation(keras.callbacks.Callback):
    """Validates on several ranks at once: arrays that are the same on all ranks are divided among them.

    The ranks get the batches of the validation in turn. The metrics of all ranks are combined, so the results are
    those of the whole data. Arrays that differ between the ranks are each rank's own part already, and are not
    divided. Use `hvd.shard` to divide other data. `hvd.callbacks.distributed` adds this callback.
    """

    def __init__(self) -> None:
        super().__init__()
        self._decided = False
        self._mine: DealtData | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Replace the `evaluate` that `fit` calls."""
        self._decided, self._mine = False, None
        self.model.__dict__.pop(_METHOD, None)  # left by a fit that ended with an error
        if engine_of(self.model).size > 1:
            self.model.__dict__[_METHOD] = self._evaluate

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Restore the model's own `evaluate`."""
        self.model.__dict__.pop(_METHOD, None)
        self._mine = None

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        evaluate = getattr(type(self.model), _METHOD)
        if not kwargs.get("_use_cached_eval_dataset"):  # called by the user
            return evaluate(self.model, *args, **kwargs)
        if not self._decided:
            self._decided, self._mine = True, self._part(kwargs)
        if self._mine is None:
            return evaluate(self.model, *args, **kwargs)
        del kwargs["_use_cached_eval_dataset"]
        return evaluate(self.model, *args, **kwargs | _NO_OTHER_DATA | self._mine.arguments())

    def _part(self, given: dict[str, Any]) -> DealtData | None:
        engine = engine_of(self.model)
        parts = (given["x"], given.get("y"), given.get("sample_weight"))
        whole = (
            dealt_data(parts, given["batch_size"], given["steps"], engine.size) if _arrays(parts) else None
        )
        everyone = engine.allgather_object(None if whole is None else _checksum(whole))
        if (
            whole is None
            or any(checksum != everyone[0] for checksum in everyone)
            or not whole.enough(engine.size)
        ):
            return None
        return whole.dealt(engine.rank, engine.size)


def _arrays(parts: Any) -> bool:
    leaves = [leaf for leaf in keras.tree.flatten(parts) if leaf is not None]
    return all(hasattr(leaf, "__array__") and not isinstance(leaf, tf.RaggedTensor) for leaf in leaves)


def _checksum(whole: Any) -> list[int]:
    assert isinstance(whole, Arrays)
    leaves = [leaf for leaf in keras.tree.flatten(whole.parts) if leaf is not None]
    return [whole.length, *(structures.checksum(leaf) for leaf in leaves)]
