"""Call MPI_Allreduce from Python, once for the whole array or once for each piece of it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from hvdtrain.bench.work.sums import Method, measure
from hvdtrain.collectives.mpi.engine import load_mpi


def prepare(settings: Mapping[str, Any]) -> Callable[[dict], dict]:
    """Initialize MPI.

    Args:
        settings: `piece`, the number of bytes in one call; without it one call takes the whole array.

    Returns:
        A function that answers requests.
    """
    comm = load_mpi().COMM_WORLD
    method = Method(comm.Barrier, partial(_bind, comm, settings.get("piece")))
    return lambda request: measure(method, request, comm.rank, comm.size)


def _bind(comm: Any, piece: int | None, array: np.ndarray) -> Callable[[], np.ndarray]:
    out = np.empty_like(array)
    step = (piece or array.nbytes) // array.itemsize

    def in_pieces() -> np.ndarray:
        for start in range(0, array.size, step):
            comm.Allreduce(array[start : start + step], out[start : start + step])
        return out

    # One call needs no slices, whose creation would be timed too.
    return (lambda: comm.Allreduce(array, out) or out) if step >= array.size else in_pieces
