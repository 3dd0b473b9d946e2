"""Copy an optimizer with its configuration, settings and state, and save the copy under the name of its base."""

import re
import types
from typing import Any

import keras
from keras.src import api_export
from keras.src.saving import object_registration

# Settings have these types. Attributes with variables are not copied: each optimizer creates its own.
_SETTINGS = (bool, int, float, str, tuple, set, frozenset, type(None), re.Pattern, types.FunctionType)
_NOT_COPIED = ("name", "built", "_lock")


def copy_optimizer(optimizer: Any, kind: type, **changes: Any) -> Any:
    """Return an optimizer of another class that continues with the configuration and state of this one.

    Args:
        optimizer: The optimizer to copy, built or not; it is not changed.
        kind: The class of the copy, whose constructor takes the same arguments as that of the optimizer.
        changes: Arguments of the constructor that differ from the optimizer's configuration.

    Raises:
        TypeError: If the optimizer's `get_config()` does not contain an argument that its constructor needs.
    """
    config = _configuration(optimizer)
    try:
        copy = kind(**{**config, **changes}) if changes else kind.from_config(config)  # type: ignore[attr-defined]
    except TypeError as error:
        raise TypeError(
            f"{type(optimizer).__name__} cannot be copied from its own get_config(): {error}. Make its "
            "get_config() return every argument that its __init__ takes."
        ) from error
    _copy_settings(optimizer, copy, changes)
    if optimizer.built:
        copy.build(optimizer._trainable_variables)
    for target, source in zip(copy.variables, optimizer.variables, strict=True):
        target.assign(source)
    return copy


def copy_with(optimizer: Any, mixin: type, attributes: dict[str, Any], **changes: Any) -> Any:
    """Return a copy of an optimizer whose class has the same name, a mixin before its base, and more attributes."""
    base = type(optimizer)
    kind = type(base.__name__, (mixin, base), attributes)
    _save_as(kind, base)
    return copy_optimizer(optimizer, kind, **changes)


def copy_loss_scale(optimizer: Any, inner: Any, *names: str) -> Any:
    """Return a copy of a `LossScaleOptimizer` with another inner optimizer, and its attributes of these names."""
    copy = copy_optimizer(optimizer, type(optimizer), inner_optimizer=inner)
    for name in names:
        object.__setattr__(copy, name, getattr(inner, name))
    return copy


def _copy_settings(optimizer: Any, copy: Any, changes: dict[str, Any]) -> None:
    """Copy what was set after construction, for example by `exclude_from_weight_decay`."""
    for name, value in vars(optimizer).items():
        excluded = name in _NOT_COPIED or name in changes or name.startswith("_hvdtrain")
        if isinstance(value, _SETTINGS) and not excluded and getattr(copy, name, None) != value:
            object.__setattr__(copy, name, type(value)(value) if isinstance(value, set) else value)


def _configuration(optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's configuration, with a schedule as an object: it may not be serializable."""
    rate = getattr(optimizer, "_learning_rate", None)
    if not callable(rate) or isinstance(rate, keras.Variable):
        return optimizer.get_config()
    object.__setattr__(optimizer, "_learning_rate", 0.0)
    try:
        return {**optimizer.get_config(), "learning_rate": rate}
    finally:
        object.__setattr__(optimizer, "_learning_rate", rate)


def _save_as(distributed: type, base: type) -> None:
    """Make Keras save the class of a distributed optimizer under the name of its base, so that Keras can load it.

    Only Keras' tables from class to name are changed, not those from name to class, so that a loaded optimizer
    is always of the class `base`.
    """
    distributed.__module__ = base.__module__
    distributed.__qualname__ = base.__qualname__
    for table in (api_export.REGISTERED_OBJS_TO_NAMES, object_registration.GLOBAL_CUSTOM_NAMES):
        if base in table:
            table[distributed] = table[base]
