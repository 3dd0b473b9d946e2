"""The order of callbacks in a `fit` with checkpoints: a piece of ours first, the checkpoint last."""

from typing import Any

import keras

from hvdtrain.keras.callbacks.forwarding import Forwarding
from hvdtrain.keras.checkpointing.restoring import Opening


def in_order(
    model: keras.Model, given: dict[str, Any], opening: Opening, last: keras.callbacks.Callback
) -> Any:
    """Put one piece before all callbacks and the other after them, history included."""
    callbacks = given.get("callbacks")
    others = [each for each in _list(callbacks) if each is not last and not isinstance(each, Opening)]
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [opening, *others, last]
    callbacks.callbacks[:] = [opening, *others, last]
    opening.set_model(model)
    opening.set_params(callbacks.params)
    return callbacks


def keep_history(given: dict[str, Any]) -> None:
    """Put the history, which Keras would add behind all others, among those whose state counts."""
    callbacks = given.get("callbacks")
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        listed = _list(callbacks)
        known = any(isinstance(each, keras.callbacks.History) for each in listed)
        given["callbacks"] = listed if known else [*listed, keras.callbacks.History()]


def whose_state_counts(given: dict[str, Any], last: keras.callbacks.Callback) -> list[Any]:
    """List the callbacks that a training's state is made of."""
    return [each for each in flat(given) if each is not last and not isinstance(each, Opening)]


def flat(given: dict[str, Any]) -> list[Any]:
    """List the callbacks with those that they hand events on to, as `hvd.callbacks.distributed` does."""
    return _opened(_list(given.get("callbacks")))


def _opened(callbacks: list[Any]) -> list[Any]:
    found = []
    for each in callbacks:
        found += _opened(each.inner) if isinstance(each, Forwarding) else [each]
    return found


def _list(callbacks: Any) -> list[Any]:
    inner = callbacks.callbacks if isinstance(callbacks, keras.callbacks.CallbackList) else callbacks
    return keras.tree.flatten(inner or [])


def steps_passed_over(given: dict[str, Any]) -> int:
    """Return how many steps of the first epoch a run before this one has done."""
    return sum(each.already for each in _list(given.get("callbacks")) if isinstance(each, Opening))
