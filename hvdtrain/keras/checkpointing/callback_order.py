"""Order the callbacks of a `fit` with checkpoints: a restoring callback first, `Checkpoint` last."""

from typing import Any

import keras

from hvdtrain.keras.callbacks.rank_zero import Forwarding
from hvdtrain.keras.checkpointing.restoring import RestoreState


def in_order(
    model: keras.Model, given: dict[str, Any], first: RestoreState, last: keras.callbacks.Callback
) -> Any:
    """Put `first` before all callbacks and `last` after them, including History."""
    callbacks = given.get("callbacks")
    others = [
        callback
        for callback in _list(callbacks)
        if callback is not last and not isinstance(callback, RestoreState)
    ]
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [first, *others, last]
    callbacks.callbacks[:] = [first, *others, last]
    first.set_model(model)
    first.set_params(callbacks.params)
    return callbacks


def keep_history(given: dict[str, Any]) -> None:
    """Add History to the callbacks, so that its state is saved; Keras would add it after all others."""
    callbacks = given.get("callbacks")
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        listed = _list(callbacks)
        known = any(isinstance(callback, keras.callbacks.History) for callback in listed)
        given["callbacks"] = listed if known else [*listed, keras.callbacks.History()]


def callbacks_with_state(given: dict[str, Any], last: keras.callbacks.Callback) -> list[Any]:
    """List the callbacks whose state is saved."""
    return [
        callback
        for callback in flat(given)
        if callback is not last and not isinstance(callback, RestoreState)
    ]


def flat(given: dict[str, Any]) -> list[Any]:
    """List the callbacks, in place of forwarding ones like `hvd.callbacks.distributed` those inside them."""
    return _unwrapped(_list(given.get("callbacks")))


def _unwrapped(callbacks: list[Any]) -> list[Any]:
    found = []
    for callback in callbacks:
        found += _unwrapped(callback.inner) if isinstance(callback, Forwarding) else [callback]
    return found


def _list(callbacks: Any) -> list[Any]:
    inner = callbacks.callbacks if isinstance(callbacks, keras.callbacks.CallbackList) else callbacks
    return keras.tree.flatten(inner or [])


def steps_passed_over(given: dict[str, Any]) -> int:
    """Return the number of steps of the first epoch that an earlier run has done."""
    return sum(
        callback.already for callback in _list(given.get("callbacks")) if isinstance(callback, RestoreState)
    )
