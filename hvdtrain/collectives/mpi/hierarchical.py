"""Reduce large arrays in a cluster: in a ring on each host, in rings between hosts, and again on each host."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hvdtrain.collectives.mpi.ring import EAGER, RENDEZVOUS, Pause, Ring, in_mpi
from hvdtrain.collectives.ops import Pair

# If the part of a rank is smaller than this, MPI's own algorithms are faster, because they need fewer messages.
LEAST_PART_BYTES = 128 << 10
# On one host MPI's own algorithms are as fast at this size, and faster below: the whole array stays in the caches.
LEAST_IN_MEMORY = 8 << 20
# Bytes per host with which the rings between hosts are compared; the least takes 0.1 s on a link of 1 Gbit/s.
# Beyond the most, a world is so large that few arrays use rings, and comparing would take longer than it saves.
LEAST_SAMPLE_BYTES, MOST_SAMPLE_BYTES = 4 << 20, 16 << 20
# On links with fewer bytes per second, sending gradients during backprop saves more time than its thread costs.
SLOW_LINK = 1e9


class Rings:
    """Rings that combine large arrays over the ranks of a communicator.

    A link between h hosts carries 2 (h - 1) / h of the array, for any number of ranks on each host, if this number
    is the same on all hosts.

    Args:
        local: The ring of this host's ranks, in memory; None if each host has one rank, or the hosts have different
            numbers of ranks.
        cross: The ring of one rank of each host, or without `local` the ring of all ranks; None if there is one
            host.
        size: Number of ranks.
        link: Bytes per second between two hosts, in each direction.
    """

    def __init__(self, local: Ring | None, cross: Ring | None, size: int, link: float = math.inf) -> None:
        self._local, self._cross = local, cross
        least = (
            LEAST_PART_BYTES * size if cross is not None else max(LEAST_IN_MEMORY, LEAST_PART_BYTES * size)
        )
        self._least = least if size > 1 else math.inf
        self.link = link

    def serves(self, nbytes: int) -> bool:
        """Return whether arrays are together large enough for rings to be the fastest algorithm."""
        return nbytes >= self._least

    def reduce(
        self,
        pairs: Sequence[Pair],
        combine: Callable,
        finish: Callable[[np.ndarray], Any],
        pause: Pause = in_mpi,
    ) -> None:
        """Combine arrays of each rank; the arguments are those of `Ring.reduce`."""
        local, cross = self._local, self._cross
        if local is not None and cross is not None:

            def between_hosts(part: Sequence[np.ndarray]) -> None:
                if part:  # for very small arrays some ranks have no part; the same ranks on each host
                    cross.reduce([(segment, segment) for segment in part], combine, finish, pause)

            local.reduce(pairs, combine, _keep, pause, between_hosts)
        else:
            for ring in filter(None, (local, cross)):
                ring.reduce(pairs, combine, finish, pause)

    def free(self) -> None:
        """Free the communicators; all ranks call this."""
        for ring in filter(None, (self._local, self._cross)):
            ring.free()


def choose_rings(mpi: Any, comm: Any) -> Rings:
    """Choose the fastest rings for the ranks of a communicator; all ranks call this.

    On one host nothing is measured. Between hosts each pipelining is measured, which takes well under a second in
    total. The order of the sums is the same for each, so the choice does not change a single bit of a result.

    Args:
        mpi: The module `mpi4py.MPI`.
        comm: The communicator.
    """
    host = comm.Split_type(mpi.COMM_TYPE_SHARED, key=comm.rank)
    if comm.allreduce(host.size, mpi.MIN) == comm.size:
        return Rings(Ring(mpi, host), None, comm.size)
    alike = comm.allreduce(host.size, mpi.MIN) == comm.allreduce(host.size, mpi.MAX)
    sharing = host.size if alike else 1  # number of ranks of a host that share the data for another host
    cross = comm.Split(host.rank, comm.rank) if alike else comm.Split(0, host.bcast(comm.rank))
    local = Ring(mpi, host) if alike and host.size > 1 else None
    if local is None:
        host.Free()
    rings = {pipelining: Ring(mpi, cross.Dup(), pipelining) for pipelining in (EAGER, RENDEZVOUS)}
    hosts = cross.size
    cross.Free()
    nbytes = min(max(LEAST_SAMPLE_BYTES, LEAST_PART_BYTES * comm.size), MOST_SAMPLE_BYTES)
    seconds = {pipelining: _seconds(mpi, comm, ring, nbytes // sharing) for pipelining, ring in rings.items()}
    # In a short sample, large messages look faster than they are, because it has few of them.
    fastest = RENDEZVOUS if seconds[RENDEZVOUS] < 0.9 * seconds[EAGER] else EAGER
    # In a large world a sum needs many messages and takes long even on a fast link, so their time is subtracted.
    transfer_seconds = seconds[fastest] - _seconds(mpi, comm, rings[fastest], 4 * hosts)
    for pipelining, ring in rings.items():
        if pipelining != fastest:
            ring.free()
    return Rings(
        local, rings[fastest], comm.size, 2 * (hosts - 1) / hosts * nbytes / max(transfer_seconds, 1e-9)
    )


def _seconds(mpi: Any, comm: Any, ring: Ring, nbytes: int) -> float:
    """Measure the time of a sum on the slowest rank, in seconds; the first sum also connects the ranks."""
    array = np.zeros(nbytes // 4, np.float32)
    durations: list[float] = []
    while sum(durations) < 0.1 and len(durations) < 3:
        comm.Barrier()
        start = time.perf_counter()
        ring.reduce([(array, array)], np.add, _keep)
        durations.append(comm.allreduce(time.perf_counter() - start, mpi.MAX))
    return min(durations)


def _keep(segment: np.ndarray) -> None:
    """Change nothing."""
