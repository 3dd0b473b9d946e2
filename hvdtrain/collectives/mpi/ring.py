"""Sum many arrays in place with a segmented ring allreduce, and average them while they are in the cache.

The arrays are treated as one array, and each rank owns one part of it. In n - 1 steps the parts are sent around
the ring and summed, in another n - 1 steps the sums are sent around (Patarasuk and Yuan, "Bandwidth optimal
all-reduce algorithms", 2009). Every link carries 2 (n - 1) / n of the whole, which is the least that any algorithm
needs. Parts are divided into segments, and each segment is sent on as soon as it has arrived, so that a link is
never idle and a sum never leaves the cache; MPI's own algorithms finish one part before they begin with the next.
MPI copies the bytes directly from the arrays of one rank to the arrays of the next.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdtrain.collectives.ops import Pair


@dataclass(frozen=True)
class Pipelining:
    """How an array is divided into messages on a link.

    Args:
        segment_bytes: Number of bytes in one message.
        ahead: How many messages to a rank may be in flight at the same time.
    """

    segment_bytes: int
    ahead: int


# Half of the second-level cache of a core holds the received segments and the segments to which they are added.
IN_MEMORY = Pipelining(512 << 10, 2)
# Open MPI and MPICH send messages below 64 KiB at once (eager protocol). Larger ones first wait for an answer
# (rendezvous protocol), and between two hosts this answer arrives after all the data that the other host has just
# sent: half of the link's rate is lost.
EAGER = Pipelining(60 << 10, 32)
# For networks whose hardware answers, where the cost of a message exceeds that of its bytes.
RENDEZVOUS = Pipelining(512 << 10, 8)


# How to wait for a request; called before each test of it. Returns the seconds to sleep until the next test, which
# leaves the core to the computation, or None to wait inside MPI.
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
    """A ring of the ranks of a communicator, which combines large arrays.

    Args:
        mpi: The module `mpi4py.MPI`.
        comm: The communicator; ranks of one host follow each other in it, so that few links connect hosts.
        pipelining: How arrays are divided into messages.
    """

    def __init__(self, mpi: Any, comm: Any, pipelining: Pipelining = IN_MEMORY) -> None:
        self._mpi, self._comm = mpi, comm
        self._rank, self._size = comm.rank, comm.size
        self._segment = pipelining.segment_bytes
        self._buffers = [np.empty(self._segment, np.uint8) for _ in range(pipelining.ahead)]
        self._interrupted: Any = None

    def reduce(
        self,
        pairs: Sequence[Pair],
        combine: Callable,
        finish: Callable[[np.ndarray], Any],
        pause: Pause = in_mpi,
        on_sums: Callable[[list[np.ndarray]], Any] | None = None,
    ) -> None:
        """Combine the arrays of all ranks, with the same results, bit by bit, on each.

        Args:
            pairs: Each array and the array for its result, which may be the same: flat arrays of one dtype, with
                the same lengths on all ranks.
            combine: A NumPy function of two arrays and `out`.
            finish: Called once with each segment of the result, to change it in place.
            pause: How to wait for a message.
            on_sums: Called once with the sums of this rank's part, before they are sent around; ranks with the same
                number in rings of one size have the same part.
        """
        if self._interrupted:
            raise RuntimeError(
                "An earlier sum over the ranks was interrupted by Ctrl-C or by an error, and its messages that are "
                "still in flight would be taken for a part of this one. Start the training again; with "
                "hvd.callbacks.Checkpoint it continues from its last checkpoint."
            )
        lengths = tuple(source.size for source, _ in pairs)
        schedule = _schedule(lengths, self._rank, self._size, self._segment // pairs[0][0].itemsize)
        if on_sums is None:
            self._run(schedule, range(schedule.items), pairs, combine, finish, pause)
        else:
            self._run(schedule, range(schedule.reduced), pairs, combine, finish, pause)
            on_sums([pairs[index][1][place] for index, place in schedule.own])
            self._run(schedule, range(schedule.reduced, schedule.items), pairs, combine, finish, pause)
        # MPI sends the remaining messages to other ranks only while this rank is inside a call of MPI.
        wait(self._comm.Ibarrier(), pause)

    def free(self) -> None:
        """Free the communicator; all ranks call this."""
        self._comm.Free()

    def _run(
        self,
        schedule: "_Schedule",
        items: range,
        pairs: Sequence[Pair],
        combine: Callable,
        finish: Callable[[np.ndarray], Any],
        pause: Pause,
    ) -> None:
        ahead = min(len(self._buffers), schedule.segments)
        received = {item: self._receive(schedule, item, pairs) for item in items[: ahead - 1]}
        sent = {item: self._send(schedule, item, pairs) for item in items[:ahead]}
        # Keep references: until all messages have arrived, MPI may write to this memory, even after an error here.
        self._interrupted = (pairs, received, sent)
        with np.errstate(all="ignore"):  # an overflow belongs to the user's sum, and is not reported here
            for item in items:
                next_item = item + ahead - 1
                if next_item in items:
                    if next_item - schedule.reduced in sent:  # the message overwrites data that is being sent
                        wait(sent.pop(next_item - schedule.reduced), pause)
                    received[next_item] = self._receive(schedule, next_item, pairs)
                wait(received.pop(item), pause)
                if item < schedule.reduced:
                    index, place = schedule.receives(item)
                    total = pairs[index][1][place]
                    combine(pairs[index][0][place], self._buffer(item, total), out=total)
                    if item >= schedule.reduced - schedule.segments:
                        finish(total)
                if item + ahead in items:
                    sent[item + ahead] = self._send(schedule, item + ahead, pairs)
            for request in sent.values():
                wait(request, pause)
        self._interrupted = None

    def _send(self, schedule: "_Schedule", item: int, pairs: Sequence[Pair]) -> Any:
        index, place = schedule.sends(item)
        array = pairs[index][item >= schedule.segments][place]  # sums are in the second array of a pair
        return self._comm.Isend(array.view(np.uint8), (self._rank + 1) % self._size)

    def _receive(self, schedule: "_Schedule", item: int, pairs: Sequence[Pair]) -> Any:
        index, place = schedule.receives(item)
        target = pairs[index][1][place]
        buffer = self._buffer(item, target) if item < schedule.reduced else target
        return self._comm.Irecv(buffer.view(np.uint8), (self._rank - 1) % self._size)

    def _buffer(self, item: int, like: np.ndarray) -> np.ndarray:
        return self._buffers[item % len(self._buffers)][: like.nbytes].view(like.dtype)


# The index of an array, and a slice of it.
Piece = tuple[int, slice]

_EMPTY: Piece = (0, slice(0, 0))


class _Schedule:
    """The order in which one rank sends and receives segments; in both directions items are numbered in this order.

    Args:
        lengths: Lengths of the arrays, which are treated as one array.
        rank: The rank.
        size: Number of ranks.
        segment: Most elements of a segment, which never spans two arrays.
    """

    def __init__(self, lengths: Sequence[int], rank: int, size: int, segment: int) -> None:
        self._rank, self._size = rank, size
        part = -(-sum(lengths) // size)
        bounds = [(number * part, (number + 1) * part) for number in range(size)]
        self._parts = [list(_cut(lengths, *limits, segment)) for limits in bounds]
        # Borders between arrays may divide one part into more segments than another; the missing ones are empty.
        self.segments = max(map(len, self._parts))
        self.reduced = (size - 1) * self.segments
        self.items = 2 * self.reduced
        # The part whose sums this rank holds when all parts have been sent around once.
        self.own = list(_cut(lengths, *bounds[(rank + 1) % size], max(part, 1)))

    def sends(self, item: int) -> Piece:
        return self._place(self._rank - item // self.segments, item % self.segments)

    def receives(self, item: int) -> Piece:
        return self._place(self._rank - item // self.segments - 1, item % self.segments)

    def _place(self, part: int, segment: int) -> Piece:
        pieces = self._parts[part % self._size]
        return pieces[segment] if segment < len(pieces) else _EMPTY


_schedule = functools.lru_cache(256)(_Schedule)  # every training step uses the same schedule


def _cut(lengths: Sequence[int], first: int, last: int, segment: int) -> Iterator[Piece]:
    """Divide elements `first` to `last` of all arrays, treated as one, into pieces that each lie in one array."""
    offset = 0
    for index, length in enumerate(lengths):
        start, stop = max(first - offset, 0), min(last - offset, length)
        for position in range(start, stop, segment):
            yield index, slice(position, min(position + segment, stop))
        offset += length
