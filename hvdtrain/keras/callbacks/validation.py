"""Validation in `fit`: what all ranks hold is divided among them."""

from typing import Any

import keras
import tensorflow as tf

from hvdtrain.data import structures
from hvdtrain.keras.callbacks.membership import engine_of
from hvdtrain.keras.dealt_batches import Arrays, Deck, deck

_SEAM = "evaluate"
_NOTHING_BESIDE = dict.fromkeys(("y", "sample_weight", "batch_size", "steps"))


class DivideValidation(keras.callbacks.Callback):
    """Validates on several ranks at once: arrays that are the same on all ranks are divided among them.

    The ranks get the batches of the validation in turn. The metrics of all ranks are combined, so the results
    are those of the whole. Arrays that differ between the ranks are each rank's own part already, and stay
    so. Other data is divided by `hvd.shard`. `hvd.callbacks.distributed` adds this callback.
    """

    def __init__(self) -> None:
        super().__init__()
        self._decided = False
        self._mine: Deck | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Begin to stand before the `evaluate` that `fit` calls."""
        self._decided, self._mine = False, None
        self.model.__dict__.pop(_SEAM, None)  # left by a fit that an error ended
        if engine_of(self.model).size > 1:
            self.model.__dict__[_SEAM] = self._evaluate

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """End."""
        self.model.__dict__.pop(_SEAM, None)
        self._mine = None

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        evaluate = getattr(type(self.model), _SEAM)
        if not kwargs.get("_use_cached_eval_dataset"):  # called by the user
            return evaluate(self.model, *args, **kwargs)
        if not self._decided:
            self._decided, self._mine = True, self._part(kwargs)
        if self._mine is None:
            return evaluate(self.model, *args, **kwargs)
        del kwargs["_use_cached_eval_dataset"]
        return evaluate(self.model, *args, **kwargs | _NOTHING_BESIDE | self._mine.arguments())

    def _part(self, given: dict[str, Any]) -> Deck | None:
        engine = engine_of(self.model)
        parts = (given["x"], given.get("y"), given.get("sample_weight"))
        whole = deck(parts, given["batch_size"], given["steps"], engine.size) if _arrays(parts) else None
        everyone = engine.allgather_object(None if whole is None else _checksum(whole))
        if whole is None or any(each != everyone[0] for each in everyone) or not whole.enough(engine.size):
            return None
        return whole.dealt(engine.rank, engine.size)


def _arrays(parts: Any) -> bool:
    leaves = [each for each in keras.tree.flatten(parts) if each is not None]
    return all(hasattr(each, "__array__") and not isinstance(each, tf.RaggedTensor) for each in leaves)


def _checksum(whole: Any) -> list[int]:
    assert isinstance(whole, Arrays)
    return [
        whole.length,
        *(structures.checksum(each) for each in keras.tree.flatten(whole.parts) if each is not None),
    ]
