"""What the engine was built with: the questions by which scripts for Horovod choose their way."""

import importlib.util
from typing import Any

from hvdtrain import runtime


def mpi_built(verbose: bool = False) -> bool:
    """Return whether MPI can be used here."""
    return importlib.util.find_spec("mpi4py") is not None


def mpi_enabled() -> bool:
    """Return whether MPI moves the bytes of this world.

    Raises:
        ValueError: If `hvd.init()` was not called.
    """
    return runtime.engine().name != "single"


def mpi_threads_supported() -> bool:
    """Return whether the script may use MPI from threads of its own, beside the engine.

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
    return int(_told_by_horovod("nccl_built"))


def ddl_built(verbose: bool = False) -> bool:
    """Return False: IBM's DDL is not used."""
    return False


def ccl_built(verbose: bool = False) -> bool:
    """Return whether Horovod was built with Intel's oneCCL, on the horovod engine."""
    return bool(_told_by_horovod("ccl_built"))


def cuda_built(verbose: bool = False) -> bool:
    """Return whether Horovod was built with CUDA, on the horovod engine."""
    return bool(_told_by_horovod("cuda_built"))


def rocm_built(verbose: bool = False) -> bool:
    """Return whether Horovod was built with ROCm, on the horovod engine."""
    return bool(_told_by_horovod("rocm_built"))


def _told_by_horovod(question: str) -> Any:
    """Ask the Horovod that the engine has loaded; importing it by name could find something else."""
    if not runtime.is_initialized():
        return 0
    horovod = getattr(runtime.engine(), "horovod", None)
    return getattr(horovod, question)() if horovod is not None else 0
