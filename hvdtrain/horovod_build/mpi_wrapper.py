"""Find the MPI of a compiler wrapper, and provide settings with which every MPI starts ranks."""

import subprocess
from pathlib import Path

from hvdtrain.collectives.mpi.library import mpi_name

__all__ = ["lenient_settings", "mpi_behind", "mpi_name"]

_PRINT_MPI_VERSION = r"""
#include <mpi.h>
#include <cstdio>
int main() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length;
  MPI_Get_library_version(text, &length);
  std::puts(text);
}
"""


def lenient_settings() -> dict[str, str]:
    """Return settings that allow more ranks than cores, also as root; for verification and tests, not for speed.

    Returns:
        Environment variables for the launcher. Each MPI reads its own variables and ignores the others.
    """
    settings = {"OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_hwloc_base_binding_policy": "none"}
    settings |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    settings |= {"PRTE_MCA_hwloc_default_binding_policy": "none", "OMPI_MCA_mpi_yield_when_idle": "1"}
    for mpi in ("OMPI", "PRTE"):
        settings |= {f"{mpi}_ALLOW_RUN_AS_ROOT": "1", f"{mpi}_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return settings


def mpi_behind(wrapper: Path, folder: Path) -> str:
    """Return the MPI that a compiler wrapper links, by compiling and running a program that prints it.

    The program does not call `MPI_Init`, as the standard allows, so it also runs where no job may start.

    Args:
        wrapper: The C++ compiler wrapper, such as `mpicxx`.
        folder: An existing folder for the program.

    Returns:
        The name of the MPI and its version, in the form of `mpi_name`.

    Raises:
        RuntimeError: The wrapper cannot compile the program, or the program fails; the text is the reason.
    """
    source, program = folder / "which_mpi.cc", folder / "which_mpi"
    source.write_text(_PRINT_MPI_VERSION)
    _output([str(wrapper), str(source), "-o", str(program)])
    return mpi_name(_output([str(program)]))


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(str(error)) from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(next((line for line in lines if "error" in line.lower()), lines[-1]))
    return done.stdout
