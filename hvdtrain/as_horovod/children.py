"""Processes that the script starts through `multiprocessing` import what the script imports."""

import functools
from collections.abc import Callable
from multiprocessing import spawn
from typing import Any


class _Install:
    """Unpickled in a new process before anything of the script is imported there."""

    def __init__(self, install: Callable[[], None]) -> None:
        self._install = install

    def __reduce__(self) -> tuple[Any, ...]:
        return self._install, ()


def follow(install: Callable[[], None]) -> None:
    """Call `install` in processes started by "spawn" and "forkserver" too; forked ones have it already.

    Args:
        install: A function of a module, which a new process can import.
    """
    prepare = spawn.get_preparation_data

    @functools.wraps(prepare)
    def prepare_and_install(name: str) -> dict[str, Any]:
        return {"hvdtrain_as_horovod": _Install(install), **prepare(name)}

    spawn.get_preparation_data = prepare_and_install
