"""The Horovod that is installed, also where `horovod` is another name of hvdtrain in this process."""

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any

# True while hvdtrain starts Horovod's core for itself.
serves_hvdtrain = False


@contextlib.contextmanager
def for_hvdtrain() -> Iterator[None]:
    """Mark what is done with Horovod's core in the block as hvdtrain's own."""
    global serves_hvdtrain
    serves_hvdtrain = True
    try:
        yield
    finally:
        serves_hvdtrain = False


@functools.cache
def load_horovod() -> Any:
    """Import Horovod's native core once; what a script imports as `horovod` stays what it was.

    Returns:
        The installed module `horovod.tensorflow`.

    Raises:
        ImportError: If Horovod is not installed, or not built for this TensorFlow.
    """
    with _without_stand_in():
        return importlib.import_module("horovod.tensorflow")


def find_horovod() -> ModuleSpec | None:
    """Tell where Horovod is installed, without importing it; None where it is not."""
    with _without_stand_in():
        return importlib.util.find_spec("horovod")


@contextlib.contextmanager
def _without_stand_in() -> Iterator[None]:
    """Take the finder of hvdtrain.as_horovod and its modules out of Python's tables for a moment."""
    finders = [each for each in sys.meta_path if getattr(each, "stands_in_for_horovod", False)]
    if not finders:
        yield
        return
    sys.meta_path[:] = [each for each in sys.meta_path if each not in finders]
    standing_in = _taken_out()
    try:
        yield
    finally:
        _taken_out()
        sys.modules.update(standing_in)
        sys.meta_path[:0] = finders


def _taken_out() -> dict[str, Any]:
    names = [name for name in sys.modules if name.partition(".")[0] == "horovod"]
    return {name: sys.modules.pop(name) for name in names}
