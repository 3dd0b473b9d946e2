"""Loads the MPI library that mpi4py finds, without initialising it, and tells which one it is.

Without MPI_Init this is safe under a launcher of another MPI, and under none.
"""

import json


def main() -> None:
    """Prints one JSON object: mpi4py's version and what the MPI library says of itself."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    print("\n" + json.dumps({"mpi4py": mpi4py.__version__, "library": MPI.Get_library_version()}))


if __name__ == "__main__":
    main()
