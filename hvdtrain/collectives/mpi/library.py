"""Which MPI is this: one short name for a library, however it is asked.

Horovod's build, mpi4py and the launcher each know the MPI they belong to by a text of their own.
"""

import re

# The first row that matches wins: the descendants of MPICH come before it, because they name it too.
_NAMES = (
    ("Open MPI", r"Open MPI\)? v?([\w.]+)"),
    ("Intel(R) MPI", r"Intel\(R\) MPI Library.*?(\d{4}[\d.]*)"),
    ("Cray MPICH", r"CRAY MPICH version ([\w.]+)"),
    ("MVAPICH", r"MVAPICH\d? Version\s*:\s*([\w.]+)"),
    ("MPICH", r"MPICH Version:\s*([\w.]+)"),
    ("MPICH", r"HYDRA build details:\s*Version:\s*([\w.]+)"),
)


def mpi_name(text: str) -> str:
    """Make the texts by which one MPI library names itself comparable.

    Args:
        text: What `MPI.Get_library_version()` returns, or what `mpirun --version` prints.

    Returns:
        Name and version, such as "Open MPI 4.1.8", "MPICH 4.2.3" or "Intel(R) MPI 2021.11"; for an
        unknown library the first line of the text.
    """
    for name, pattern in _NAMES:
        found = re.search(pattern, text, re.IGNORECASE | re.DOTALL)
        if found:
            return f"{name} {found.group(1).rstrip('.')}"
    return text.strip().partition("\n")[0].strip()
