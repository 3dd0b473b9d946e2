"""A ring in segments: large arrays are summed where they lie, and averaged while they are in the cache.

Each rank owns one part of the array. In n - 1 steps the parts go around and are summed, in another n - 1 the sums
go around (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009). Every link carries 2 (n - 1) / n
of the array, which is the least that any algorithm needs. Parts are cut into segments, and each segment goes on as
soon as it has come, so that a link is never idle and a sum never leaves the cache; MPI's own algorithms finish one
part before they begin with the next. MPI moves the bytes, from where they lie to where they belong.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Stride:
    """How an array travels along a link.

    Args:
        segment_bytes: How much goes in one message.
        ahead: How many messages may be on their way to a rank.
    """

    segment_bytes: int
    ahead: int


# Half of a core's second cache holds what has come and what it is added to.
IN_MEMORY = Stride(512 << 10, 2)
# Open MPI and MPICH send messages below 64 KiB without asking. Larger ones wait for an answer, and between two
# hosts that comes behind all that the other one has just sent: half of a link's rate is lost.
UNASKED = Stride(60 << 10, 32)
# Where the network's hardware answers, and a message costs more than the link.
ASKED = Stride(512 << 10, 8)


class Ring:
    """Combines arrays over the ranks of a communicator.

    Args:
        mpi: The module `mpi4py.MPI`.
        comm: The communicator; ranks of one host follow each other in it, so that few links leave a host.
        stride: How arrays travel.
    """

    def __init__(self, mpi: Any, comm: Any, stride: Stride = IN_MEMORY) -> None:
        self._mpi, self._comm = mpi, comm
        self._rank, self._size = comm.rank, comm.size
        self._segment = stride.segment_bytes
        self._arrived = [np.empty(self._segment, np.uint8) for _ in range(stride.ahead)]

    def reduce(
        self,
        source: np.ndarray,
        target: np.ndarray,
        combine: Callable,
        finish: Callable[[np.ndarray], Any],
        pause: float | None = None,
        whole: Callable[[np.ndarray], Any] | None = None,
    ) -> None:
        """Combines an array of each rank into `target`, with the same result, to the bit, on all of them.

        Args:
            source: Flat array, of the same dtype and length on all ranks.
            target: Where the result goes; may be `source` itself.
            combine: NumPy's function of two arrays and `out`.
            finish: Called once with each segment of the result, to change it where it lies.
            pause: Seconds to sleep between two looks for a message, which leaves the core to the computation;
                None to wait inside MPI.
            whole: Called once with all that this rank has combined, before it goes around; the ranks at the same
                place of rings of one size have the same part.
        """
        way = _Way(source.size, self._rank, self._size, self._segment // source.dtype.itemsize)
        if whole is None:
            self._go(way, range(way.items), source, target, combine, finish, pause)
        else:
            self._go(way, range(way.reduced), source, target, combine, finish, pause)
            whole(target[way.own])
            self._go(way, range(way.reduced, way.items), source, target, combine, finish, pause)
        # MPI moves what is still on its way to others only while this rank is in a call.
        wait(self._comm.Ibarrier(), pause)

    def free(self) -> None:
        """Gives the communicator back; all ranks call this."""
        self._comm.Free()

    def _go(
        self,
        way: "_Way",
        items: range,
        source: np.ndarray,
        target: np.ndarray,
        combine: Callable,
        finish: Callable[[np.ndarray], Any],
        pause: float | None,
    ) -> None:
        ahead = min(len(self._arrived), way.segments)
        received = {item: self._receive(way, item, target) for item in items[: ahead - 1]}
        sent = {item: self._send(way, item, source, target) for item in items[:ahead]}
        with np.errstate(all="ignore"):  # what overflows does so in the user's sum, not here
            for item in items:
                coming = item + ahead - 1
                if coming in items:
                    if coming - way.reduced in sent:  # overwrites what was sent from there
                        wait(sent.pop(coming - way.reduced), pause)
                    received[coming] = self._receive(way, coming, target)
                wait(received.pop(item), pause)
                if item < way.reduced:
                    total = target[way.receives(item)]
                    combine(source[way.receives(item)], self._landing(item, total), out=total)
                    if item >= way.reduced - way.segments:
                        finish(total)
                if item + ahead in items:
                    sent[item + ahead] = self._send(way, item + ahead, source, target)
            for each in sent.values():
                wait(each, pause)

    def _send(self, way: "_Way", item: int, source: np.ndarray, target: np.ndarray) -> Any:
        array = source if item < way.segments else target
        return self._comm.Isend(array[way.sends(item)].view(np.uint8), (self._rank + 1) % self._size)

    def _receive(self, way: "_Way", item: int, target: np.ndarray) -> Any:
        place = target[way.receives(item)]
        landing = self._landing(item, place) if item < way.reduced else place
        return self._comm.Irecv(landing.view(np.uint8), (self._rank - 1) % self._size)

    def _landing(self, item: int, like: np.ndarray) -> np.ndarray:
        return self._arrived[item % len(self._arrived)][: like.nbytes].view(like.dtype)


def wait(request: Any, pause: float | None) -> None:
    """Waits for a request of MPI: inside MPI, or asleep between two looks, so many seconds apart."""
    if pause is None:
        request.Wait()
        return
    while not request.Test():
        time.sleep(pause)


class _Way:
    """Which segment is sent and which received when: both are numbered in the order of their travel."""

    def __init__(self, length: int, rank: int, size: int, segment: int) -> None:
        self._length, self._rank, self._size, self._segment = length, rank, size, segment
        self._part = -(-length // size)
        self.segments = -(-self._part // segment)
        self.reduced = (size - 1) * self.segments
        self.items = 2 * self.reduced

    @property
    def own(self) -> slice:
        """What this rank has combined when all has gone around once."""
        first = (self._rank + 1) % self._size * self._part
        return slice(min(first, self._length), min(first + self._part, self._length))

    def sends(self, item: int) -> slice:
        return self._place(self._rank - item // self.segments, item % self.segments)

    def receives(self, item: int) -> slice:
        return self._place(self._rank - item // self.segments - 1, item % self.segments)

    def _place(self, part: int, segment: int) -> slice:
        first = part % self._size * self._part
        start = first + segment * self._segment
        stop = min(start + self._segment, first + self._part, self._length)
        return slice(start, max(start, stop))
