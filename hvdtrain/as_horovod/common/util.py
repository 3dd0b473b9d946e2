"""Names that scripts import from `horovod.common.util`."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from hvdtrain.runtime import build_info
from hvdtrain.tensorflow.util import (
    check_extension,
    check_num_rank_power_of_2,
    gpu_available,
    split_list,
)

num_rank_is_power_2 = check_num_rank_power_of_2


def extension_available(ext_base_name: str, verbose: bool = False) -> bool:
    """Return whether a framework is supported: only TensorFlow is."""
    return ext_base_name == "tensorflow"


def mpi_built(verbose: bool = False) -> bool:
    """Return whether ranks can communicate over MPI."""
    return bool(build_info.mpi_built())


def gloo_built(verbose: bool = False) -> bool:
    """Return whether ranks can communicate over Gloo."""
    return bool(build_info.gloo_built())


def nccl_built(verbose: bool = False) -> bool:
    """Return whether GPUs can communicate over NCCL."""
    return bool(build_info.nccl_built())


def ddl_built(verbose: bool = False) -> bool:
    """Return whether DDL of IBM is available."""
    return bool(build_info.ddl_built())


def ccl_built(verbose: bool = False) -> bool:
    """Return whether oneCCL is available."""
    return bool(build_info.ccl_built())


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


__all__ = [
    "ccl_built",
    "check_extension",
    "ddl_built",
    "env",
    "extension_available",
    "gloo_built",
    "gpu_available",
    "is_iterable",
    "is_version_greater_equal_than",
    "mpi_built",
    "nccl_built",
    "num_rank_is_power_2",
    "split_list",
]
