"""How a function of Keras, TensorFlow or Python is changed while a script runs, and which class to change."""

import functools
from collections.abc import Callable
from typing import Any

Make = Callable[[Callable[..., Any]], Callable[..., Any]]


def replace(owner: Any, name: str, make: Make) -> None:
    """Puts `make(original)` in the place of a function, with the original's name and documentation.

    Args:
        owner: A class or module.
        name: Name of the function in it.
        make: Takes the function and returns the one in its place.
    """
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def replace_where_defined(kind: type, name: str, make: Make) -> None:
    """Changes a method in the class that defines it, by which Keras tells whether a script overrides it.

    Args:
        kind: A class that has the method, perhaps by inheritance.
        name: Name of the method.
        make: Takes the method and returns the one in its place.
    """
    replace(definer(kind, name), name, make)


def definer(kind: type, name: str) -> Any:
    """Returns the class among a class and its bases that defines a name."""
    return next(each for each in kind.__mro__ if name in vars(each))
