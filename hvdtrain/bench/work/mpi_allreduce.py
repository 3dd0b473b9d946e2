"""MPI_Allreduce called from Python: in one call, or in pieces."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from hvdtrain.bench.work.sums import Way, measure
from hvdtrain.collectives.mpi.engine import load_mpi


def prepare(settings: Mapping[str, Any]) -> Callable[[dict], dict]:
    """Joins MPI's world; `piece` is how many bytes go into one call, all without it."""
    comm = load_mpi().COMM_WORLD
    way = Way(comm.Barrier, partial(_bound, comm, settings.get("piece")))
    return lambda request: measure(way, request, comm.rank, comm.size)


def _bound(comm: Any, piece: int | None, array: np.ndarray) -> Callable[[], np.ndarray]:
    out = np.empty_like(array)
    step = (piece or array.nbytes) // array.itemsize

    def once() -> np.ndarray:
        for start in range(0, array.size, step):
            comm.Allreduce(array[start : start + step], out[start : start + step])
        return out

    return (lambda: comm.Allreduce(array, out) or out) if step >= array.size else once
