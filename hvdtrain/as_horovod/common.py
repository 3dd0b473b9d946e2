"""Names that scripts import from `horovod.common` and its modules; hvdtrain itself does not use them."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from hvdtrain.keras.elastic import HorovodInternalError, HostsUpdatedInterrupt
from hvdtrain.runtime import build_info
from hvdtrain.runtime.build_info import ccl_built, ddl_built, gloo_built, mpi_built
from hvdtrain.runtime.process_sets import ProcessSet, global_process_set
from hvdtrain.tensorflow import mpi_ops
from hvdtrain.tensorflow.util import (
    check_extension,
    check_num_rank_power_of_2,
    gpu_available,
    split_list,
)

__all__ = [
    "HorovodBasics",
    "HorovodInternalError",
    "HorovodVersionMismatchError",
    "HostsUpdatedInterrupt",
    "ProcessSet",
    "ccl_built",
    "check_extension",
    "ddl_built",
    "env",
    "extension_available",
    "get_version_mismatch_message",
    "global_process_set",
    "gloo_built",
    "gpu_available",
    "is_iterable",
    "is_version_greater_equal_than",
    "mpi_built",
    "nccl_built",
    "num_rank_is_power_2",
    "split_list",
]

num_rank_is_power_2 = check_num_rank_power_of_2


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


def get_version_mismatch_message(name: str, version: str, installed_version: str) -> str:
    """Return the message for a version of a framework for which Horovod was not built."""
    return (
        f"Horovod was built for {name} {installed_version}; this is {name} {version}. Build it again with: "
        "hvdtrain build-horovod"
    )


class HorovodVersionMismatchError(ImportError):
    """The error of Horovod for a framework version for which it was not built; hvdtrain never raises it."""

    def __init__(self, name: str, version: str, installed_version: str) -> None:
        super().__init__(get_version_mismatch_message(name, version, installed_version))
        self.name = name
        self.version = version
        self.installed_version = installed_version


def extension_available(ext_base_name: str, verbose: bool = False) -> bool:
    """Return whether a framework is supported: only TensorFlow is."""
    return ext_base_name == "tensorflow"


def nccl_built(verbose: bool = False) -> bool:
    """Return whether GPUs can communicate over NCCL."""
    return bool(build_info.nccl_built())


@contextlib.contextmanager
def env(**kwargs: str | None) -> Iterator[None]:
    """Set environment variables during this context. Variables given as None stay unchanged."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def is_iterable(x: Any) -> bool:
    """Return whether a value is iterable."""
    return isinstance(x, Iterable) or hasattr(x, "__getitem__")


def is_version_greater_equal_than(ver: str, target: str) -> bool:
    """Return whether a version such as "2.21.0" is at least the target version."""
    return _numbers(ver) >= _numbers(target)


def _numbers(version: str) -> list[int]:
    return [int("".join(filter(str.isdigit, part)) or 0) for part in version.split("+")[0].split(".")[:3]]
