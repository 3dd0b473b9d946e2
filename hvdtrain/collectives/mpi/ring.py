"""A ring in segments: many arrays are summed where they lie, and averaged while they are in the cache.

The arrays are taken as one, and each rank owns one part of that. In n - 1 steps the parts go around and are
summed, in another n - 1 the sums go around (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009).
Every link carries 2 (n - 1) / n of the whole, which is the least that any algorithm needs. Parts are cut into
segments, and each segment goes on as soon as it has come, so that a link is never idle and a sum never leaves the
cache; MPI's own algorithms finish one part before they begin with the next. MPI moves the bytes, from where they
lie to where they belong.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdtrain.collectives.ops import Pair


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


# How to wait, asked before each look: asleep for so many seconds until the next one, which leaves the core to the
# computation, or for None inside MPI.
Pause = Callable[[], float | None]


def in_mpi() -> None:
    """Wait inside MPI."""


def wait(request: Any, pause: Pause) -> None:
    """Wait for a request of MPI."""
    while (seconds := pause()) is not None:
        if request.Test():
            return
        time.sleep(seconds)
    request.Wait()


class Ring:
    """Combines large arrays over the ranks of a communicator.

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
        self._broken_off: Any = None

    def reduce(
        self,
        pairs: Sequence[Pair],
        combine: Callable,
        finish: Callable[[np.ndarray], Any],
        pause: Pause = in_mpi,
        whole: Callable[[list[np.ndarray]], Any] | None = None,
    ) -> None:
        """Combine arrays of each rank, with the same results, to the bit, on all of them.

        Args:
            pairs: For each array what is combined and where the result goes, which may be the same: flat arrays of
                one dtype, of the same lengths on all ranks.
            combine: NumPy's function of two arrays and `out`.
            finish: Called once with each segment of the result, to change it where it lies.
            pause: How to wait for a message.
            whole: Called once with all that this rank has combined, before it goes around; the ranks at the same
                place of rings of one size have the same part.
        """
        if self._broken_off:
            raise RuntimeError(
                "An earlier sum over the ranks was broken off in its middle, by Ctrl-C or by an error, and what is "
                "still on its way would be taken for a part of this one. Start the training again; with "
                "hvd.callbacks.Checkpoint it goes on from its last checkpoint."
            )
        lengths = tuple(source.size for source, _ in pairs)
        way = _way(lengths, self._rank, self._size, self._segment // pairs[0][0].itemsize)
        if whole is None:
            self._go(way, range(way.items), pairs, combine, finish, pause)
        else:
            self._go(way, range(way.reduced), pairs, combine, finish, pause)
            whole([pairs[index][1][place] for index, place in way.own])
            self._go(way, range(way.reduced, way.items), pairs, combine, finish, pause)
        # MPI moves what is still on its way to others only while this rank is in a call.
        wait(self._comm.Ibarrier(), pause)

    def free(self) -> None:
        """Give the communicator back; all ranks call this."""
        self._comm.Free()

    def _go(
        self,
        way: "_Way",
        items: range,
        pairs: Sequence[Pair],
        combine: Callable,
        finish: Callable[[np.ndarray], Any],
        pause: Pause,
    ) -> None:
        ahead = min(len(self._arrived), way.segments)
        received = {item: self._receive(way, item, pairs) for item in items[: ahead - 1]}
        sent = {item: self._send(way, item, pairs) for item in items[:ahead]}
        # Until all has come MPI may write into these, whatever becomes of this call.
        self._broken_off = (pairs, received, sent)
        with np.errstate(all="ignore"):  # what overflows does so in the user's sum, not here
            for item in items:
                coming = item + ahead - 1
                if coming in items:
                    if coming - way.reduced in sent:  # overwrites what was sent from there
                        wait(sent.pop(coming - way.reduced), pause)
                    received[coming] = self._receive(way, coming, pairs)
                wait(received.pop(item), pause)
                if item < way.reduced:
                    index, place = way.receives(item)
                    total = pairs[index][1][place]
                    combine(pairs[index][0][place], self._landing(item, total), out=total)
                    if item >= way.reduced - way.segments:
                        finish(total)
                if item + ahead in items:
                    sent[item + ahead] = self._send(way, item + ahead, pairs)
            for each in sent.values():
                wait(each, pause)
        self._broken_off = None

    def _send(self, way: "_Way", item: int, pairs: Sequence[Pair]) -> Any:
        index, place = way.sends(item)
        array = pairs[index][item >= way.segments][place]  # what others have added to is in the second
        return self._comm.Isend(array.view(np.uint8), (self._rank + 1) % self._size)

    def _receive(self, way: "_Way", item: int, pairs: Sequence[Pair]) -> Any:
        index, place = way.receives(item)
        target = pairs[index][1][place]
        landing = self._landing(item, target) if item < way.reduced else target
        return self._comm.Irecv(landing.view(np.uint8), (self._rank - 1) % self._size)

    def _landing(self, item: int, like: np.ndarray) -> np.ndarray:
        return self._arrived[item % len(self._arrived)][: like.nbytes].view(like.dtype)


# Which array, and what of it.
Piece = tuple[int, slice]

_NOTHING: Piece = (0, slice(0, 0))


class _Way:
    """Which segment is sent and which received when: both are numbered in the order of their travel.

    Args:
        lengths: Of the arrays, which are taken as one.
        rank: Whose way it is.
        size: How many ranks there are.
        segment: The most elements of a segment, which lies in one array.
    """

    def __init__(self, lengths: Sequence[int], rank: int, size: int, segment: int) -> None:
        self._rank, self._size = rank, size
        part = -(-sum(lengths) // size)
        bounds = [(number * part, (number + 1) * part) for number in range(size)]
        self._parts = [list(_cut(lengths, *each, segment)) for each in bounds]
        # Borders between arrays may give a part more segments than another, whose last ones then are empty.
        self.segments = max(map(len, self._parts))
        self.reduced = (size - 1) * self.segments
        self.items = 2 * self.reduced
        # What this rank has combined when all has gone around once.
        self.own = list(_cut(lengths, *bounds[(rank + 1) % size], max(part, 1)))

    def sends(self, item: int) -> Piece:
        return self._place(self._rank - item // self.segments, item % self.segments)

    def receives(self, item: int) -> Piece:
        return self._place(self._rank - item // self.segments - 1, item % self.segments)

    def _place(self, part: int, segment: int) -> Piece:
        pieces = self._parts[part % self._size]
        return pieces[segment] if segment < len(pieces) else _NOTHING


_way = functools.lru_cache(256)(_Way)  # every step of a training takes the same


def _cut(lengths: Sequence[int], first: int, last: int, segment: int) -> Iterator[Piece]:
    """Cut what lies from `first` to `last` of all arrays taken as one into pieces that lie in one array each."""
    begins = 0
    for index, length in enumerate(lengths):
        start, stop = max(first - begins, 0), min(last - begins, length)
        for at in range(start, stop, segment):
            yield index, slice(at, min(at + segment, stop))
        begins += length
