"""Find and import the installed Horovod, even if `import horovod` gives hvdtrain in this process."""

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any

# True while hvdtrain itself starts Horovod's core.
serves_hvdtrain = False


@contextlib.contextmanager
def for_hvdtrain() -> Iterator[None]:
    """Mark calls of Horovod's core inside the block as made by hvdtrain."""
    global serves_hvdtrain
    serves_hvdtrain = True
    try:
        yield
    finally:
        serves_hvdtrain = False


@functools.cache
def load_horovod() -> Any:
    """Import Horovod's native core once, without changing what a script imports as `horovod`.

    Returns:
        The installed module `horovod.tensorflow`.

    Raises:
        ImportError: If Horovod is not installed, or not built for this TensorFlow.
    """
    with _without_stand_in():
        return importlib.import_module("horovod.tensorflow")


def find_horovod() -> ModuleSpec | None:
    """Find the installed Horovod without importing it; return None if it is not installed."""
    with _without_stand_in():
        return importlib.util.find_spec("horovod")


@contextlib.contextmanager
def _without_stand_in() -> Iterator[None]:
    """Remove the finder of hvdtrain.as_horovod and its modules from Python's tables inside the block."""
    finders = [finder for finder in sys.meta_path if getattr(finder, "stands_in_for_horovod", False)]
    if not finders:
        yield
        return
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in finders]
    modules = _remove_modules()
    try:
        yield
    finally:
        _remove_modules()
        sys.modules.update(modules)
        sys.meta_path[:0] = finders


def _remove_modules() -> dict[str, Any]:
    names = [name for name in sys.modules if name.partition(".")[0] == "horovod"]
    return {name: sys.modules.pop(name) for name in names}
