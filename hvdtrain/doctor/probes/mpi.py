"""Load the MPI library that mpi4py finds, without initialising it, and print its name and version.

Without MPI_Init this is safe under the launcher of another MPI and without a launcher.
"""

import json


def main() -> None:
    """Print one JSON object: the version of mpi4py and the version text of the MPI library."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    print("\n" + json.dumps({"mpi4py": mpi4py.__version__, "library": MPI.Get_library_version()}))


if __name__ == "__main__":
    main()
