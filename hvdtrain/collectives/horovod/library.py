"""Find and import the installed Horovod, even if `import horovod` gives hvdtrain, and let it write its timeline."""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from hvdtrain import settings

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


@contextlib.contextmanager
def ready_for_timeline(comm: Any) -> Iterator[bool]:
    """Let a Horovod that is initialized inside the block record later, if the environment of any rank requests it.

    Horovod must know this on all ranks or on none, because otherwise the ranks misread each other's messages: an
    `mpirun` that passes HOROVOD_TIMELINE to some hosts only would hang. Horovod must not know the path, because
    hvdtrain writes that file.

    Args:
        comm: The mpi4py communicator of all ranks.

    Yields:
        True if Horovod will be able to record.
    """
    before = os.environ.pop("HOROVOD_TIMELINE", None)
    asked = bool(before or settings.get("HVDTRAIN_TIMELINE"))
    everywhere = any(comm.allgather(asked))
    if everywhere:
        os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"
    try:
        yield everywhere
    finally:
        os.environ.pop("HOROVOD_TIMELINE", None)
        if before is not None:
            os.environ["HOROVOD_TIMELINE"] = before


def record_timeline(horovod: Any, path: Path, mark_cycles: bool) -> Callable[[], None]:
    """Let Horovod's core record from now on; called on rank 0 only, which coordinates all ranks.

    Args:
        horovod: The module `horovod.tensorflow`, initialised.
        path: The file to write.
        mark_cycles: Whether to mark the start of each cycle.

    Returns:
        A function that stops the recording.
    """
    horovod.start_timeline(str(path), mark_cycles)

    def stop() -> None:
        with contextlib.suppress(ValueError):  # Horovod was already shut down, and has closed its file
            horovod.stop_timeline()

    return stop
