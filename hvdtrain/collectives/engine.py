"""Define the interface of all engines, and compare the calls of all ranks before each operation.

The public methods are the same for all engines: they check their arguments, make sure that all ranks
request the same operation, and then pass contiguous buffers to the few methods that an engine implements.
"""

import contextlib
import functools
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvdtrain import heartbeat
from hvdtrain.collectives import join, reduction
from hvdtrain.collectives.agreement import Call, StandIn, ranks_text, root_index
from hvdtrain.collectives.errors import MismatchError, report
from hvdtrain.collectives.ops import Op, Pair, carrier, described, inner, operand, pickled, reducible
from hvdtrain.collectives.overlap import BackgroundThread
from hvdtrain.messages import logger

_PHASES = {
    kind: kind.upper() for kind in ("allgather", "broadcast", "reducescatter", "alltoall", "barrier", "join")
}

__all__ = ["Call", "Engine", "MismatchError", "Op", "StandIn", "World", "ranks_text"]


@dataclass(frozen=True)
class World:
    """Position of this process: among all, on its host, and among those with its local rank on other hosts."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    cross_rank: int = 0
    cross_size: int = 1
    homogeneous: bool = True


class Engine(ABC):
    """Collective operations on NumPy arrays over all ranks of one world, or of one process set in it.

    All ranks must call every operation in the same order and with matching arguments. If they do not, all of
    them raise `MismatchError`, and the message shows which ranks requested what.
    """

    name: str
    library: str
    world: World
    closed: bool = False
    background: BackgroundThread | None = None  # sends gradients during backprop, or None
    last_error: Exception | None = None  # kept, because TensorFlow replaces an error by one of its own
    timeline: Any = None  # a `Timeline` while one is written
    warned_of_zeros = False  # True after the first warning of integer means that were rounded to 0
    has_joined = False  # True once all ranks have called `join`, perhaps at different times
    _joined: AbstractSet[int] = (
        frozenset()
    )  # the ranks that had joined when the calls of the ranks last differed
    _members: tuple[int, ...] | None = None
    _doing: str = ""
    _where: bytes = b""
    _members_text: bytes = b""  # the members of a process set, as text

    @property
    def rank(self) -> int:
        """Number of this process, from 0 to size - 1."""
        return self.world.rank

    @property
    def size(self) -> int:
        """Number of participating processes."""
        return self.world.size

    @property
    def ranks(self) -> tuple[int, ...]:
        """The participating ranks, as numbered in the whole world; a root_rank is one of these."""
        return self._members or tuple(range(self.size))

    # Methods that an engine implements.

    @abstractmethod
    def _compared(self, number: int, value: int = 0) -> tuple[bool, int]:
        """Return on all ranks whether all passed the same `number` of at most 63 bits, and the largest `value`."""

    @abstractmethod
    def _reduce(self, send: np.ndarray, receive: np.ndarray, op: Op) -> None:
        """Reduce `send` over all ranks into `receive`, which may be `send` itself; never ADASUM."""

    @abstractmethod
    def _gather(self, array: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Join all ranks' arrays along the first dimension; also return each rank's first dimension."""

    @abstractmethod
    def _broadcast(self, array: np.ndarray, root_rank: int) -> np.ndarray:
        """Return the array of `root_rank`; those of the other ranks have the same shape and dtype."""

    @abstractmethod
    def _reduce_scatter(self, array: np.ndarray, rows: Sequence[int], op: Op) -> np.ndarray:
        """Reduce over all ranks and return this rank's `rows[rank]` rows of the result; never AVERAGE."""

    @abstractmethod
    def _exchange(self, array: np.ndarray, splits: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """Send `splits[r]` rows to each rank r; return the received rows, and their number from each rank."""

    @abstractmethod
    def _subset(self, ranks: Sequence[int]) -> "Engine | None":
        """Make an engine for some of the ranks; None on the others. All ranks call this."""

    @abstractmethod
    def shutdown(self) -> None:
        """Free the resources of the engine; no operation may follow."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """End the processes of all ranks at once with this exit code."""

    def _reduce_all(self, pairs: Sequence[Pair], op: Op) -> None:
        """Reduce arrays of one dtype, each as `_reduce` does; an engine may combine them."""
        for send, receive in pairs:
            self._reduce(send, receive, op)

    def native_tensors(self) -> Any:
        """Return the engine's own graph operations on framework tensors, or None if it has none."""
        return None

    def native_timeline(self, path: Path, mark_cycles: bool) -> Callable[[], None] | None:
        """Let the engine's core record to a file; return a function that stops it, or None if there is no core."""
        return None

    # Methods for callers.

    def allreduce(
        self, array: Any, op: Op | int | str = Op.AVERAGE, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Combine one array over all ranks, with the same result, bit by bit, on each.

        Args:
            array: Array of the same shape and dtype on all ranks: float16, bfloat16, float32, float64, any
                integer, or bool. The 16-bit floats are summed in float32 and rounded once.
            op: AVERAGE (default; of integers, rounded toward zero), SUM, MIN, MAX or PRODUCT. A bool takes
                MIN (all), MAX (any) and PRODUCT. SUM and AVERAGE propagate a NaN; MIN and MAX may not.
            out: Contiguous array for the result; may be `array` itself, which saves the copy.

        Returns:
            `out`, or a new array of the shape and dtype of `array`.

        Raises:
            TypeError: If the dtype cannot be reduced this way.
            MismatchError: If the ranks do not call this alike.
        """
        op = Op.of(op)
        array = reducible(array, op, "allreduce")
        self.agree(_allreduce(array.dtype, array.shape, op))
        if out is None:
            out = np.empty_like(array, order="C")
        elif out.shape != array.shape or out.dtype != array.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"allreduce: `out` must be a contiguous array like `array`, {described(array)}. "
                f"Received: {described(out)}."
            )
        if np.may_share_memory(array, out):
            array = out if array.ctypes.data == out.ctypes.data else array.copy()
        reduction.reduce_pairs(self, [(array, out)], op)
        return out

    def grouped_allreduce(
        self,
        arrays: Sequence[Any],
        op: Op | int | str = Op.AVERAGE,
        call: Call | None = None,
        in_place: Sequence[bool] = (),
    ) -> list[np.ndarray]:
        """Combine many arrays in a few operations: small ones are sent together.

        Args:
            arrays: Arrays as for `allreduce`, of any shapes and dtypes, the same list on all ranks.
            op: As for `allreduce`.
            call: The call that the ranks compare before they start; built from the arrays by default. A caller that
                reduces the same arrays in each step builds it once and can name the arrays in it.
            in_place: For each array whether the result replaces it, in which case it must be contiguous and
                writable; by default no array is replaced.

        Returns:
            Arrays of the shapes and dtypes of `arrays`. New ones may share memory with each other.

        Raises:
            TypeError: If a dtype cannot be reduced this way.
            MismatchError: If the ranks do not call this alike.
        """
        op = Op.of(op)
        operands = [reducible(array, op, "grouped_allreduce") for array in arrays]
        if call is None:
            details = (op.name.lower(), *(described(array) for array in operands))
            call = Call("grouped_allreduce", details, stand_in=_stand_in(operands, op))
        self.agree(call)
        return reduction.combine(self, operands, op, in_place or [False] * len(operands))

    def allgather(self, array: Any) -> np.ndarray:
        """Join the arrays of all ranks along their first dimension, in the order of the ranks.

        Args:
            array: Array of any dtype without Python objects; the first dimension may differ between ranks,
                the others may not. A number counts as an array of shape (1,).

        Returns:
            Array of shape (sum of first dimensions, ...).

        Raises:
            MismatchError: If dtype or later dimensions differ between ranks.
        """
        array = operand(array, "allgather")
        array = array.reshape(1) if array.ndim == 0 else array
        stand_in = StandIn(gathered=((array.dtype.name, array.shape[1:]),))
        self.agree(Call("allgather", (f"{array.dtype} of shape (any, {inner(array)})",), stand_in=stand_in))
        with self._span("ALLGATHER"):
            return self._gather(array)[0]

    def broadcast(self, array: Any, root_rank: int = 0) -> np.ndarray:
        """Send the array of one rank to all ranks.

        Args:
            array: Array of the same shape and dtype on all ranks.
            root_rank: The rank whose array is sent, as numbered in the whole world.

        Returns:
            New array with the values of `root_rank`.

        Raises:
            ValueError: If there is no such rank.
            MismatchError: If shape, dtype or root_rank differ between ranks.
        """
        array = operand(array, "broadcast")
        root = root_index(self.ranks, root_rank, "broadcast")
        self.agree(Call("broadcast", (f"{described(array)}, root_rank={root_rank}",)))
        with self._span("BROADCAST"):
            return self._broadcast(array, root)

    def reducescatter(self, array: Any, op: Op | int | str = Op.AVERAGE) -> np.ndarray:
        """Combine one array over all ranks and give each rank its part of the rows.

        Args:
            array: As for `allreduce`, with at least one dimension. If the first dimension is not divisible
                by the number of ranks, the first ranks get one row more.
            op: As for `allreduce`.

        Returns:
            This rank's rows of the combined array.

        Raises:
            ValueError: If `array` has no dimension.
            TypeError: If the dtype cannot be reduced this way.
            MismatchError: If the ranks do not call this alike.
        """
        op = Op.of(op)
        array = reducible(array, op, "reducescatter")
        if op is Op.ADASUM:
            raise ValueError(
                "reducescatter: Adasum needs the whole array. Expected op: sum, average, min, max or product."
            )
        if array.ndim == 0:
            raise ValueError(
                "reducescatter: expected an array with at least one dimension to split. Received a scalar."
            )
        self.agree(Call("reducescatter", (f"{described(array)}, op={op.name.lower()}",)))
        rows = reduction.rows_of_ranks(len(array), self.size)
        wide = array.astype(carrier(array.dtype, op), copy=False)
        with self._span("REDUCESCATTER"):
            mine = self._reduce_scatter(wide, rows, Op.SUM if op is Op.AVERAGE else op)
        return reduction.averaged(mine, op, self.size).astype(array.dtype, copy=False)

    def alltoall(self, array: Any, splits: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Send a part of the rows to each rank and receive a part from each.

        Args:
            array: Array with at least one dimension; dtype and later dimensions are the same on all ranks.
            splits: Number of rows for each rank; by default equal parts, for which the first dimension
                must be divisible by the number of ranks.

        Returns:
            The received rows in the order of their senders, and an int32 array of shape (size,): the number of
            rows from each. It is int64 if a number of rows does not fit int32.

        Raises:
            ValueError: If `splits` does not match the array.
            MismatchError: If dtype or later dimensions differ between ranks.
        """
        array = operand(array, "alltoall")
        splits = self._splits(array, splits)
        self.agree(Call("alltoall", (f"{array.dtype} of shape (any, {inner(array)})",)))
        with self._span("ALLTOALL"):
            received, counts = self._exchange(array, splits)
        return received, np.array(counts, np.int32 if max(counts) < 1 << 31 else np.int64)

    def allgather_object(self, value: Any) -> list[Any]:
        """Return the picklable values of all ranks, in their order, on every rank; None for a rank that joined.

        Raises:
            TypeError: If this rank's value cannot be pickled. All other ranks get a `MismatchError`.
        """
        data = self._picklable(value, "allgather_object")
        self.agree(Call("allgather_object", stand_in=StandIn(objects=True)))
        with self._waiting():
            return self._gather_objects(data)

    def gather_object(self, value: Any, root_rank: int = 0) -> list[Any] | None:
        """Return the picklable values of all ranks on `root_rank`, and None on the others.

        Raises:
            TypeError: If this rank's value cannot be pickled. All other ranks get a `MismatchError`.
        """
        root = root_index(self.ranks, root_rank, "gather_object")
        data = self._picklable(value, "gather_object")
        self.agree(Call("gather_object", (f"root_rank={root_rank}",)))
        with self._waiting():
            values = self._gather_objects(data)
        return values if self.rank == root else None

    def broadcast_object(self, value: Any = None, root_rank: int = 0) -> Any:
        """Return the picklable value of `root_rank` on every rank; the values of the others are ignored.

        Raises:
            TypeError: On `root_rank`, if its value cannot be pickled. All other ranks get a `MismatchError`.
        """
        root = root_index(self.ranks, root_rank, "broadcast_object")
        data = self._picklable(value, "broadcast_object") if self.rank == root else np.empty(0, np.uint8)
        self.agree(Call("broadcast_object", (f"root_rank={root_rank}",)))
        with self._waiting():
            length = int(self._broadcast(np.array([len(data)]), root)[0])
            buffer = data if self.rank == root else np.empty(length, np.uint8)
            data = self._broadcast(buffer, root)
        return pickle.loads(data.data)

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.agree(Call("barrier", stand_in=StandIn()))

    def join(self) -> int:
        """Let the other ranks finish their batches: until all have called this, this rank sends zeros.

        A mean is still divided by the number of all ranks, including those that have joined. Sums, means, gathers
        (to which this rank adds nothing) and barriers continue; any other operation raises on all ranks.

        Returns:
            The rank that joined last; the highest one if several did.

        Raises:
            MismatchError: On every rank, if another operation needs this rank.
        """
        self._finish_background()
        last = join.wait_for_all(self)
        self.has_joined = True
        return last

    def subset(self, ranks: Sequence[int]) -> "Engine | None":
        """Make an engine for a process set. All ranks of this one call it, with the same ranks.

        Args:
            ranks: The participating ranks, without repetition; they keep their order in the world.

        Returns:
            An engine like this one on the participating ranks, None on the others.

        Raises:
            ValueError: If there are no such ranks.
            MismatchError: If the ranks do not request the same set.
        """
        ordered = sorted(set(ranks))
        if not ordered or len(ordered) != len(ranks) or not set(ordered) <= set(range(self.size)):
            raise ValueError(
                f"A process set holds different ranks of 0 to {self.size - 1}, at least one. Received: "
                f"{list(ranks)}."
            )
        self.agree(Call("process set", (ranks_text(ordered),)))
        part = self._subset(ordered)
        if part is not None:
            part.timeline = self.timeline
            part._members_text = ranks_text(part.ranks).encode()
        return part

    def say(self, message: str) -> None:
        """Log a message for the user, on rank 0 only; see `hvdtrain.messages`."""
        if self.rank == 0:
            logger.info(message)

    def warn(self, message: str) -> None:
        """Log a warning for the user, on rank 0 only; see `hvdtrain.messages`."""
        if self.rank == 0:
            logger.warning(message)

    def agree(self, call: Call, value: int = 0) -> int:
        """Make sure that all ranks make this call now, before any of them may wait for another.

        Args:
            call: The next operation of this rank.
            value: A number; the largest one of all ranks is returned, at no further cost.

        Returns:
            The largest `value` of all ranks.

        Raises:
            MismatchError: On every rank, if one rank's call differs; the message names ranks and calls.
        """
        if self.closed:
            raise ValueError(
                f"{call.kind}: hvd.shutdown() was called. Call hvd.init() again, and wrap the optimizer again."
            )
        self._finish_background()
        self._doing, self._where = call.kind, call.where
        with self._span(f"NEGOTIATE_{_PHASES.get(call.kind, 'ALLREDUCE')}"):
            if self.size == 1:
                return value
            same, largest = self._compared(call.digest, value)
            if not same:
                join.settle(self, call)
            return largest

    def _finish_background(self) -> None:
        """Wait for operations left by an interrupted step, before the ranks compare their next call."""
        if self.background is not None and self.background.is_busy and not self.background.is_current:
            self.background.finish()

    def leave_to_core(self) -> None:
        """Note that the engine's own graph operations now run the operation that the ranks have agreed on."""
        heartbeat.left_to_core(self._where, self._members_text)

    def _picklable(self, value: Any, function: str) -> np.ndarray:
        """Pickle a value before any rank waits for it; an error is reported to all ranks."""
        try:
            return pickled(value)
        except Exception as error:
            raised = TypeError(
                f"{function}: expected an object that can be pickled. Received: an object of type "
                f"{type(value).__name__}, of which pickle says: {error}"
            )
            report(self, function, raised)
            raise raised from error

    def _gather_objects(self, data: np.ndarray) -> list[Any]:
        """Return the objects of all ranks; `data` is the pickled object of this rank."""
        joined, lengths = self._gather(data)
        ends = np.cumsum(lengths)
        return [
            pickle.loads(joined[end - length : end].data) for end, length in zip(ends, lengths, strict=True)
        ]

    def _splits(self, array: np.ndarray, splits: Sequence[int] | None) -> list[int]:
        if array.ndim == 0:
            raise ValueError(
                "alltoall: expected an array with at least one dimension to split. Received a scalar."
            )
        if splits is None:
            if len(array) % self.size:
                raise ValueError(
                    f"alltoall: without `splits` the first dimension must divide by the {self.size} ranks. "
                    f"Received on rank {self.rank}: shape {array.shape}. Pass `splits`."
                )
            return [len(array) // self.size] * self.size
        splits = [int(count) for count in splits]
        if len(splits) != self.size or sum(splits) != len(array) or min(splits) < 0:
            raise ValueError(
                f"alltoall: `splits` must hold {self.size} counts that add up to {len(array)}, the first "
                f"dimension. Received on rank {self.rank}: splits={splits}."
            )
        return splits

    def _span(self, phase: str) -> AbstractContextManager[Any]:
        """Note a phase of the current operation: in the heartbeat, and in the timeline while one is written."""
        timeline = self.timeline  # read once, because another thread may set it to None
        if timeline is None:
            return self._waiting()
        members = f" of {ranks_text(self.ranks)}" if self._members else ""
        contexts = contextlib.ExitStack()
        contexts.enter_context(timeline.span(self._doing + members, phase))
        contexts.enter_context(self._waiting())
        return contexts

    def _waiting(self) -> AbstractContextManager[Any]:
        """Note in the heartbeat that this rank waits for the others in the current operation."""
        return (
            heartbeat.Waiting(self._where, self._members_text) if self.size > 1 else contextlib.nullcontext()
        )


@functools.lru_cache(1024)  # building the text takes longer than a small sum
def _allreduce(dtype: np.dtype, shape: tuple[int, ...], op: Op) -> Call:
    stand_in = StandIn(((dtype.name, shape),), op=op)
    return Call("allreduce", (f"{dtype} of shape {shape}, op={op.name.lower()}",), stand_in=stand_in)


def _stand_in(arrays: Sequence[np.ndarray], op: Op) -> StandIn:
    return StandIn(tuple((array.dtype.name, array.shape) for array in arrays), op=op)
