"""A saved model must load in plain Keras: the distributed class is saved under its base's name."""

from keras.src import api_export
from keras.src.saving import object_registration


def save_as(distributed: type, base: type) -> None:
    """Make Keras write `distributed` into a file as if it were `base`, registered name included.

    Only the way from class to name is entered in Keras' tables. The way back, from a file's name to a class,
    stays as it was, so that a loaded optimizer is the plain one everywhere.

    Args:
        distributed: The class of a distributed optimizer.
        base: The class it was made from.
    """
    distributed.__module__ = base.__module__
    distributed.__qualname__ = base.__qualname__
    for table in (api_export.REGISTERED_OBJS_TO_NAMES, object_registration.GLOBAL_CUSTOM_NAMES):
        if base in table:
            table[distributed] = table[base]
