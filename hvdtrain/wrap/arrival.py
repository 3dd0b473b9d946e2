"""When the script has imported Keras, and not before: it may want to set variables that Keras reads."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def install(scale_batch: bool) -> None:
    """Waits for the script's import of TensorFlow or Keras, then joins the ranks and changes Keras.

    Args:
        scale_batch: Whether each rank keeps the script's batch.
    """
    # TensorFlow may compute before the script imports Keras; the ranks have to share the machine before.
    sys.meta_path.insert(0, _After("tensorflow", lambda: importlib.import_module("keras")))
    sys.meta_path.insert(0, _After("keras", lambda: _change(scale_batch)))
    if "keras" in sys.modules or "tensorflow" in sys.modules:  # by what Python loads before any script
        importlib.import_module("keras")
        _change(scale_batch)


class _After(MetaPathFinder):
    """Does something once, after the first import of a package.

    Args:
        name: The package.
        action: What to do when it is there.
    """

    def __init__(self, name: str, action: Callable[[], Any]) -> None:
        self._name = name
        self._action = action
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answers for that package, by what the other finders say."""
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


def _change(scale_batch: bool) -> None:
    from hvdtrain.wrap.install import install

    install(scale_batch)
