"""Save a distributed optimizer under the name of its base class, so that plain Keras can load the model."""

from keras.src import api_export
from keras.src.saving import object_registration


def save_as(distributed: type, base: type) -> None:
    """Make Keras save `distributed` under the name of `base`, including a registered name.

    Only Keras' tables from class to name are changed. The tables from name to class are not changed, so that a
    loaded optimizer is always of the class `base`.

    Args:
        distributed: The class of a distributed optimizer.
        base: Its base class, the class of the user's optimizer.
    """
    distributed.__module__ = base.__module__
    distributed.__qualname__ = base.__qualname__
    for table in (api_export.REGISTERED_OBJS_TO_NAMES, object_registration.GLOBAL_CUSTOM_NAMES):
        if base in table:
            table[distributed] = table[base]
