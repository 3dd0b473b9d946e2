"""Give each MPI library one short name.

Horovod's build, mpi4py and the launcher each describe their MPI with a different text.
"""

import re

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
