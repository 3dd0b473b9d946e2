"""Processes that the script starts through `multiprocessing` import what the script imports."""

import functools
from multiprocessing import spawn
from typing import Any


class _Install:
    """Unpickled in a new process before anything of the script is imported there."""

    def __reduce__(self) -> tuple[Any, ...]:
        from hvdtrain.as_horovod import install

        return install, ()


def follow() -> None:
    """Makes processes started by "spawn" and "forkserver" do what was done here; forked ones have it already."""
    prepare = spawn.get_preparation_data

    @functools.wraps(prepare)
    def prepare_and_install(name: str) -> dict[str, Any]:
        return {"hvdtrain_as_horovod": _Install(), **prepare(name)}

    spawn.get_preparation_data = prepare_and_install
