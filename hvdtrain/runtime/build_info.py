"""Return what the engine was built with, through the functions that scripts for Horovod call."""

import importlib.util
from typing import Any

from hvdtrain import runtime


def mpi_built(verbose: bool = False) -> bool:
    """Return whether MPI can be used here."""
    return importlib.util.find_spec("mpi4py") is not None


def mpi_enabled() -> bool:
    """Return whether this world communicates over MPI.

    Raises:
        ValueError: If `hvd.init()` was not called.
    """
    return runtime.engine().name != "single"


def mpi_threads_supported() -> bool:
    """Return whether the script may use MPI from its own threads, at the same time as the engine.

    Raises:
        ValueError: If `hvd.init()` was not called.
    """
    if runtime.engine().name == "single":
        return False
    from hvdtrain.collectives.mpi.engine import load_mpi

    mpi = load_mpi()
    return mpi.Query_thread() == mpi.THREAD_MULTIPLE


def gloo_built(verbose: bool = False) -> bool:
    """Return False: hvdtrain works over MPI."""
    return False


def gloo_enabled() -> bool:
    """Return False: hvdtrain works over MPI."""
    return False


def nccl_built(verbose: bool = False) -> int:
    """Return the version of NCCL that Horovod was built with, on the horovod engine; else 0."""
    return int(_call_horovod("nccl_built"))


def ddl_built(verbose: bool = False) -> bool:
    """Return False: IBM's DDL is not used."""
    return False


def ccl_built(verbose: bool = False) -> bool:
    """Return whether Horovod was built with Intel's oneCCL, on the horovod engine."""
    return bool(_call_horovod("ccl_built"))


def cuda_built(verbose: bool = False) -> bool:
    """Return whether Horovod was built with CUDA, on the horovod engine."""
    return bool(_call_horovod("cuda_built"))


def rocm_built(verbose: bool = False) -> bool:
    """Return whether Horovod was built with ROCm, on the horovod engine."""
    return bool(_call_horovod("rocm_built"))


def _call_horovod(function: str) -> Any:
    """Call a function of the Horovod that the engine has loaded; an import by name could find another module."""
    if not runtime.is_initialized():
        return 0
    horovod = getattr(runtime.engine(), "horovod", None)
    return getattr(horovod, function)() if horovod is not None else 0
