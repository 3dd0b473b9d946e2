"""Send a message from rank 0 to a rank on another host and back, to measure the link between hosts."""

import socket
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import numpy as np

from hvdtrain.collectives.mpi.engine import load_mpi


def prepare(settings: Mapping[str, Any]) -> Callable[[dict], dict]:
    """Find a rank on another host than rank 0.

    Returns:
        A function that answers requests.

    Raises:
        RuntimeError: If all ranks are on one host.
    """
    comm = load_mpi().COMM_WORLD
    hosts = comm.allgather(socket.gethostname())
    partner = next((rank for rank, host in enumerate(hosts) if host != hosts[0]), None)
    if partner is None:
        raise RuntimeError(f"All {comm.size} ranks are on {hosts[0]}, so there is no link to measure.")
    return lambda request: _measure(comm, partner, request)


def _measure(comm: Any, partner: int, request: Mapping[str, Any]) -> dict[str, Any]:
    message = np.zeros(request["bytes"], np.uint8)
    comm.Barrier()
    begun = perf_counter()
    for _ in range(request["repeat"]):
        if comm.rank == 0:
            comm.Send(message, partner)
            comm.Recv(message, partner)
        elif comm.rank == partner:
            comm.Recv(message, 0)
            comm.Send(message, 0)
    seconds = (perf_counter() - begun) / request["repeat"] / 2
    comm.Barrier()
    return {"seconds": seconds if comm.rank in (0, partner) else 0.0, "right": True}
