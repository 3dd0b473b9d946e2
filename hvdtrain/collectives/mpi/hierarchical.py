"""The way of large arrays through a cluster: around each host, between hosts, and around each host again."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hvdtrain.collectives.mpi.ring import ASKED, UNASKED, Pause, Ring, in_mpi
from hvdtrain.collectives.ops import Pair

# A rank's part below this is better served by MPI's own algorithms, which need fewer messages.
LEAST_PART_BYTES = 128 << 10
# Within a host MPI's own algorithms are as fast up to here, and faster below: all of it stays in the caches.
LEAST_IN_MEMORY = 8 << 20
# With so much a host the ways between hosts are compared; the least takes 0.1 s on a link of 1 Gbit/s. Beyond the
# most, a world is so large that few arrays go around rings, and trying would take longer than it could save.
LEAST_SAMPLE_BYTES, MOST_SAMPLE_BYTES = 4 << 20, 16 << 20
# Below this many bytes a second a link takes longer for gradients than the core that could wait for it is worth.
SLOW_LINK = 1e9


class Rings:
    """Combines large arrays over the ranks of a communicator.

    A link between h hosts carries 2 (h - 1) / h of the array, however many ranks a host has, if all have as many.

    Args:
        local: The ring of this host's ranks, in memory; None where each host has one, or not all have as many.
        cross: The ring of one rank of each host, or without `local` of all ranks; None if there is one host.
        size: How many ranks there are.
        link: Bytes a second that go between two hosts, each way.
    """

    def __init__(self, local: Ring | None, cross: Ring | None, size: int, link: float = math.inf) -> None:
        self._local, self._cross = local, cross
        least = (
            LEAST_PART_BYTES * size if cross is not None else max(LEAST_IN_MEMORY, LEAST_PART_BYTES * size)
        )
        self._least = least if size > 1 else math.inf
        self.link = link

    def serves(self, nbytes: int) -> bool:
        """Return whether arrays are large enough, all together, for rings to be the fastest way."""
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
                if part:  # of very small arrays some ranks have none, the same ones on each host
                    cross.reduce([(each, each) for each in part], combine, finish, pause)

            local.reduce(pairs, combine, _leave, pause, between_hosts)
        else:
            for ring in filter(None, (local, cross)):
                ring.reduce(pairs, combine, finish, pause)

    def free(self) -> None:
        """Give the communicators back; all ranks call this."""
        for each in filter(None, (self._local, self._cross)):
            each.free()


def made_for(mpi: Any, comm: Any) -> Rings:
    """Find the fastest way through the ranks of a communicator; all ranks call this.

    Within a host nothing is tried. Between hosts each stride takes its turn, well below a second in all. The order
    of the sums is the same for each, so what is found changes no bit of a result.

    Args:
        mpi: The module `mpi4py.MPI`.
        comm: The communicator.
    """
    host = comm.Split_type(mpi.COMM_TYPE_SHARED, key=comm.rank)
    if comm.allreduce(host.size, mpi.MIN) == comm.size:
        return Rings(Ring(mpi, host), None, comm.size)
    alike = comm.allreduce(host.size, mpi.MIN) == comm.allreduce(host.size, mpi.MAX)
    each = host.size if alike else 1  # how many ranks of a host share what goes to another
    cross = comm.Split(host.rank, comm.rank) if alike else comm.Split(0, host.bcast(comm.rank))
    local = Ring(mpi, host) if alike and host.size > 1 else None
    if local is None:
        host.Free()
    ways = {stride: Ring(mpi, cross.Dup(), stride) for stride in (UNASKED, ASKED)}
    hosts = cross.size
    cross.Free()
    nbytes = min(max(LEAST_SAMPLE_BYTES, LEAST_PART_BYTES * comm.size), MOST_SAMPLE_BYTES)
    seconds = {stride: _seconds(mpi, comm, way, nbytes // each) for stride, way in ways.items()}
    # A short sample flatters large messages, of which it holds few.
    fastest = ASKED if seconds[ASKED] < 0.9 * seconds[UNASKED] else UNASKED
    # In a large world messages take long because there are many, however fast the link is.
    carrying = seconds[fastest] - _seconds(mpi, comm, ways[fastest], 4 * hosts)
    for stride, way in ways.items():
        if stride != fastest:
            way.free()
    return Rings(local, ways[fastest], comm.size, 2 * (hosts - 1) / hosts * nbytes / max(carrying, 1e-9))


def _seconds(mpi: Any, comm: Any, way: Ring, nbytes: int) -> float:
    """Take the time of a sum, as the slowest rank has it; the first sum also connects the ranks."""
    array = np.zeros(nbytes // 4, np.float32)
    taken: list[float] = []
    while sum(taken) < 0.1 and len(taken) < 3:
        comm.Barrier()
        start = time.perf_counter()
        way.reduce([(array, array)], np.add, _leave)
        taken.append(comm.allreduce(time.perf_counter() - start, mpi.MAX))
    return min(taken)


def _leave(segment: np.ndarray) -> None:
    """Change nothing."""
