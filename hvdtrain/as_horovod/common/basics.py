"""Names that scripts import from `horovod.common.basics`."""

from typing import Any

from hvdtrain.runtime.process_sets import ProcessSet, global_process_set
from hvdtrain.tensorflow import mpi_ops


class HorovodBasics:
    """An object with the names of `hvdtrain.tensorflow.mpi_ops`: `rank()`, `size()`, `init()`, the reductions etc.

    Args:
        pkg_path: Ignored; accepted for compatibility with Horovod.
        args: Ignored; accepted for compatibility with Horovod.
    """

    def __init__(self, pkg_path: str, *args: str) -> None:
        self._path = pkg_path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"HorovodBasics has no attribute {name!r}.")
        return getattr(mpi_ops, name)


__all__ = ["HorovodBasics", "ProcessSet", "global_process_set"]
