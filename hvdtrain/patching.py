"""How a function of Keras, TensorFlow or Python is changed while a script runs, and which class to change."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Make = Callable[[Callable[..., Any]], Callable[..., Any]]

# By the function in its place: what translates arguments, and the function that gets them.
_translated: dict[Any, tuple[Make, Callable[..., Any]]] = {}


def replace(owner: Any, name: str, make: Make) -> None:
    """Puts `make(original)` in the place of a function, with the original's name and documentation.

    Args:
        owner: A class or module.
        name: Name of the function in it.
        make: Takes the function and returns the one in its place.
    """
    original = getattr(owner, name)
    if original in _translated:
        translate, original = _translated.pop(original)
        setattr(owner, name, functools.wraps(original)(make(original)))
        replace_outermost(owner, name, translate)
    else:
        setattr(owner, name, functools.wraps(original)(make(original)))


def replace_outermost(owner: Any, name: str, make: Make) -> None:
    """Put `make(original)` in the place of a function, and keep it outside of what `replace` puts there later.

    So that what binds the arguments of a call never sees those that only this replacement understands.

    Args:
        owner: A class or module.
        name: Name of the function in it; it has at most one outermost replacement.
        make: Takes the function and returns the one in its place.
    """
    original = getattr(owner, name)
    translated = functools.wraps(original)(make(original))
    _translated[translated] = make, original
    setattr(owner, name, translated)


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


class AfterImport(MetaPathFinder):
    """Do something once, after the first import of a module.

    Args:
        name: The module.
        action: What to do when it is there.
    """

    def __init__(self, name: str, action: Callable[[], Any]) -> None:
        self._name = name
        self._action = action
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for that module as the other finders do."""
        if fullname != self._name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec and spec.loader:
            # Whoever only asks whether the package is there never comes to this.
            spec.loader.exec_module = self._loading(spec.loader.exec_module)  # type: ignore[method-assign, assignment]
        return spec

    def _loading(self, load: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def load_and_act(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._action()

        return load_and_act
