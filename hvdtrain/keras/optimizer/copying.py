"""A copy of an optimizer that is one in all respects: configuration, settings made later, and state."""

import re
import types
from typing import Any

import keras

# Settings are of these types; whatever holds variables is made anew for each optimizer.
_SETTINGS = (bool, int, float, str, tuple, set, frozenset, type(None), re.Pattern, types.FunctionType)
_OWN = ("name", "built", "_lock")


def copied(optimizer: Any, kind: type, **changes: Any) -> Any:
    """Make an optimizer of another class that goes on exactly where this one stands.

    Args:
        optimizer: The optimizer to copy, built or not; it stays as it is.
        kind: The class of the copy, whose constructor takes what the optimizer's own takes.
        changes: Arguments of the constructor that the copy gets instead of the optimizer's.

    Returns:
        The copy, with the optimizer's configuration, later settings and state.

    Raises:
        TypeError: If the optimizer's `get_config()` leaves out an argument that its constructor needs.
    """
    config = _configuration(optimizer)
    try:
        copy = kind(**{**config, **changes}) if changes else kind.from_config(config)  # type: ignore[attr-defined]
    except TypeError as error:
        raise TypeError(
            f"{type(optimizer).__name__} cannot be copied from its own get_config(): {error}. Make its "
            "get_config() return every argument that its __init__ takes."
        ) from error
    _carry_settings(optimizer, copy, changes)
    if optimizer.built:
        copy.build(optimizer._trainable_variables)
    for target, source in zip(copy.variables, optimizer.variables, strict=True):
        target.assign(source)
    return copy


def _carry_settings(optimizer: Any, copy: Any, changes: dict[str, Any]) -> None:
    """Give the copy what was set after construction, such as what `exclude_from_weight_decay` set."""
    for name, value in vars(optimizer).items():
        own = name in _OWN or name in changes or name.startswith("_hvdtrain")
        if isinstance(value, _SETTINGS) and not own and getattr(copy, name, None) != value:
            object.__setattr__(copy, name, type(value)(value) if isinstance(value, set) else value)


def _configuration(optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's configuration with the schedule itself, which need not be serializable."""
    rate = getattr(optimizer, "_learning_rate", None)
    if not callable(rate) or isinstance(rate, keras.Variable):
        return optimizer.get_config()
    object.__setattr__(optimizer, "_learning_rate", 0.0)
    try:
        return {**optimizer.get_config(), "learning_rate": rate}
    finally:
        object.__setattr__(optimizer, "_learning_rate", rate)
