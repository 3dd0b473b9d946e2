"""Replace functions of Keras, TensorFlow or Python while a script runs."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Make = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Replaced:
    """A function that was replaced in this process.

    Args:
        name: Its name, such as "keras.Model.fit".
        by: The module that replaced it.
    """

    name: str
    by: str


# All functions that were replaced, in order; `hvdtrain doctor --patches` prints them.
replaced: list[Replaced] = []

# Outermost replacement -> the function that makes it, and the function it replaces.
_translated: dict[Any, tuple[Make, Callable[..., Any]]] = {}


def replace(owner: Any, name: str, make: Make) -> None:
    """Replace a function by `make(original)`, with the original's name and documentation.

    Args:
        owner: A class or module.
        name: Name of the function in it.
        make: Takes the original function and returns its replacement.
    """
    _record(owner, name, make)
    original = getattr(owner, name)
    if original in _translated:
        translate, original = _translated.pop(original)
        setattr(owner, name, functools.wraps(original)(make(original)))
        replace_outermost(owner, name, translate)
    else:
        setattr(owner, name, functools.wraps(original)(make(original)))


def replace_outermost(owner: Any, name: str, make: Make) -> None:
    """Replace a function by `make(original)`, and keep it outside of later replacements by `replace`.

    Later replacements bind the arguments of a call. They must not see arguments that only this one understands.

    Args:
        owner: A class or module.
        name: Name of the function in it; it has at most one outermost replacement.
        make: Takes the original function and returns its replacement.
    """
    _record(owner, name, make)
    original = getattr(owner, name)
    translated = functools.wraps(original)(make(original))
    _translated[translated] = make, original
    setattr(owner, name, translated)


def replace_where_defined(kind: type, name: str, make: Make) -> None:
    """Replace a method in the class that defines it, because Keras checks by that whether a script overrides it.

    Args:
        kind: A class that has or inherits the method.
        name: Name of the method.
        make: Takes the original method and returns its replacement.
    """
    replace(definer(kind, name), name, make)


def _record(owner: Any, name: str, make: Make) -> None:
    module = getattr(owner, "__module__", "")
    path = ".".join(filter(None, (module, getattr(owner, "__qualname__", owner.__name__), name)))
    entry = Replaced(path, getattr(make, "func", make).__module__)
    if entry not in replaced:  # an outermost replacement is made anew whenever another goes under it
        replaced.append(entry)


def definer(kind: type, name: str) -> Any:
    """Return the class that defines a name: the given class or one of its bases."""
    return next(base for base in kind.__mro__ if name in vars(base))


class AfterImport(MetaPathFinder):
    """Call a function once, after the first import of a module.

    Args:
        name: Name of the module.
        action: The function to call.
    """

    def __init__(self, name: str, action: Callable[[], Any]) -> None:
        self._name = name
        self._action = action
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders return, with a loader that also calls the function."""
        if fullname != self._name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec and spec.loader:
            # Not called by code that only checks with find_spec() whether the package is installed.
            spec.loader.exec_module = self._loading(spec.loader.exec_module)  # type: ignore[method-assign, assignment]
        return spec

    def _loading(self, load: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def load_and_act(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._action()

        return load_and_act
