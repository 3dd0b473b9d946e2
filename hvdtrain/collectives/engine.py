"""The wire: what every engine can do, and the agreement of all ranks that precedes each operation.

The public methods are the same for all engines: they check their arguments, make sure that every rank
asks for the same thing, and then hand contiguous buffers to the few methods that an engine implements.
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

import cloudpickle
import numpy as np

from hvdtrain import heartbeat
from hvdtrain.collectives import join, reduction
from hvdtrain.collectives.agreement import (
    Call,
    Known,
    MismatchError,
    StandIn,
    known,
    mark,
    ranks_text,
)
from hvdtrain.collectives.ops import Op, Pair, carrier, described, inner, operand, reducible
from hvdtrain.collectives.overlap import Beside
from hvdtrain.messages import logger

_PHASES = {
    each: each.upper() for each in ("allgather", "broadcast", "reducescatter", "alltoall", "barrier", "join")
}

_MOST_WORDS = 600  # characters of an error of which other ranks are told

__all__ = ["Call", "Engine", "MismatchError", "Op", "StandIn", "World", "ranks_text"]


@dataclass(frozen=True)
class World:
    """Where this process stands: among all, among those of its host, and among its like on other hosts."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    cross_rank: int = 0
    cross_size: int = 1
    homogeneous: bool = True


class Engine(ABC):
    """Collective operations on NumPy arrays over all ranks of one world, or of one process set in it.

    Every operation must be called by all its ranks, in the same order, with arguments that fit together; if
    they do not, all of them raise `MismatchError` and the message tells who asked for what.
    """

    name: str
    library: str
    world: World
    closed: bool = False
    beside: Beside | None = None  # where gradients travel while backprop goes on; None where they do not
    last_error: Exception | None = None  # what a graph's executor wraps so deep that nobody would find it
    timeline: Any = None  # a `Timeline`, while one is written
    has_joined = False  # True once all ranks have called `join`, some of them maybe earlier than others
    _joined: AbstractSet[int] = frozenset()  # the ranks that had joined when the ranks last disagreed
    _members: tuple[int, ...] | None = None
    _doing: str = ""
    _where: bytes = b""
    _among: bytes = b""  # the members of a process set, in words

    @property
    def rank(self) -> int:
        """Number of this process, from 0 to size - 1."""
        return self.world.rank

    @property
    def size(self) -> int:
        """Number of processes that take part."""
        return self.world.size

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that take part, as the whole world numbers them; a root_rank is one of these."""
        return self._members or tuple(range(self.size))

    # What an engine implements.

    @abstractmethod
    def _compared(self, number: int, wish: int = 0) -> tuple[bool, int]:
        """Return on all ranks alike whether all passed the same number of at most 63 bits, and the largest wish."""

    @abstractmethod
    def _reduce(self, send: np.ndarray, receive: np.ndarray, op: Op) -> None:
        """Reduce `send` over all ranks into `receive`, which may be `send` itself; never ADASUM."""

    @abstractmethod
    def _gather(self, array: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Join all ranks' arrays along the first dimension; also returns each rank's first dimension."""

    @abstractmethod
    def _broadcast(self, array: np.ndarray, root_rank: int) -> np.ndarray:
        """Return root_rank's array; the others' has the same shape and dtype."""

    @abstractmethod
    def _reduce_scatter(self, array: np.ndarray, rows: Sequence[int], op: Op) -> np.ndarray:
        """Reduce over all ranks and returns this rank's `rows[rank]` rows of the result; never AVERAGE."""

    @abstractmethod
    def _exchange(self, array: np.ndarray, splits: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """Send `splits[r]` rows to each rank r; returns what came and how many rows from whom."""

    @abstractmethod
    def _subset(self, ranks: Sequence[int]) -> "Engine | None":
        """Make an engine for some of the ranks; None on the others. All ranks call this."""

    @abstractmethod
    def shutdown(self) -> None:
        """Give back what the engine holds; no operation may follow."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """End the processes of all ranks at once with this exit code."""

    def _reduce_all(self, pairs: Sequence[Pair], op: Op) -> None:
        """Reduce arrays of one dtype, each as `_reduce` does; an engine may take them as one."""
        for send, receive in pairs:
            self._reduce(send, receive, op)

    def native_tensors(self) -> Any:
        """Return the engine's own graph operations on framework tensors, or None if it has none."""
        return None

    def native_timeline(self, path: Path, mark_cycles: bool) -> Callable[[], None] | None:
        """Let the engine's own core record to a file; returns what ends that, or None where it has no core."""
        return None

    # What a caller uses.

    def allreduce(
        self, array: Any, op: Op | int | str = Op.AVERAGE, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Combine one array over all ranks, with the same result, to the bit, on each.

        Args:
            array: Array of the same shape and dtype on all ranks: float16, bfloat16, float32, float64, any
                integer, or bool. The 16-bit floats are summed in float32 and rounded once.
            op: AVERAGE (default; of integers, rounded toward zero), SUM, MIN, MAX or PRODUCT. A bool takes
                MIN (all), MAX (any) and PRODUCT. MIN and MAX need not see a NaN; SUM and AVERAGE do.
            out: Contiguous array that takes the result; may be `array` itself, which saves the copy.

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
        """Combine many arrays at the price of a few operations: small ones travel together.

        Args:
            arrays: Arrays as for `allreduce`, of any shapes and dtypes, the same list on all ranks.
            op: As for `allreduce`.
            call: What the ranks compare before they start; built from the arrays by default. A caller that
                reduces the same arrays in each step builds it once and can name the arrays in it.
            in_place: For each array whether its result is to lie where the array lies, which must be contiguous
                and writable; nowhere by default.

        Returns:
            Arrays of the shapes and dtypes of `arrays`. New ones may share memory with each other.

        Raises:
            TypeError: If a dtype cannot be reduced this way.
            MismatchError: If the ranks do not call this alike.
        """
        op = Op.of(op)
        operands = [reducible(array, op, "grouped_allreduce") for array in arrays]
        if call is None:
            details = (op.name.lower(), *(described(each) for each in operands))
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
        with self.span("ALLGATHER"):
            return self._gather(array)[0]

    def broadcast(self, array: Any, root_rank: int = 0) -> np.ndarray:
        """Give every rank the array of one.

        Args:
            array: Array of the same shape and dtype on all ranks.
            root_rank: The rank whose values all receive, as the world numbers it.

        Returns:
            New array with the values of `root_rank`.

        Raises:
            ValueError: If there is no such rank.
            MismatchError: If shape, dtype or root_rank differ between ranks.
        """
        array = operand(array, "broadcast")
        root = self.check_root(root_rank, "broadcast")
        self.agree(Call("broadcast", (f"{described(array)}, root_rank={root_rank}",)))
        with self.span("BROADCAST"):
            return self._broadcast(array, root)

    def reducescatter(self, array: Any, op: Op | int | str = Op.AVERAGE) -> np.ndarray:
        """Combine one array over all ranks and gives each rank its part of the rows.

        Args:
            array: As for `allreduce`, with at least one dimension. If the first dimension does not divide
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
        with self.span("REDUCESCATTER"):
            mine = self._reduce_scatter(wide, rows, Op.SUM if op is Op.AVERAGE else op)
        return reduction.averaged(mine, op, self.size).astype(array.dtype, copy=False)

    def alltoall(self, array: Any, splits: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Send a part of the rows to each rank and receives a part from each.

        Args:
            array: Array with at least one dimension; dtype and later dimensions are the same on all ranks.
            splits: How many rows go to each rank; by default equal parts, for which the first dimension
                must divide by the number of ranks.

        Returns:
            The received rows in the order of their senders, and an int32 array of shape (size,): how many
            rows came from each. It is int64 where a number of rows does not fit int32.

        Raises:
            ValueError: If `splits` does not fit the array.
            MismatchError: If dtype or later dimensions differ between ranks.
        """
        array = operand(array, "alltoall")
        splits = self._splits(array, splits)
        self.agree(Call("alltoall", (f"{array.dtype} of shape (any, {inner(array)})",)))
        with self.span("ALLTOALL"):
            received, counts = self._exchange(array, splits)
        return received, np.array(counts, np.int32 if max(counts) < 1 << 31 else np.int64)

    def allgather_object(self, value: Any) -> list[Any]:
        """Return the picklable values of all ranks, in their order, on every rank; of one that joined, None.

        Raises:
            TypeError: If this rank's value cannot be pickled. All other ranks get a `MismatchError`.
        """
        data = self._picklable(value, "allgather_object")
        self.agree(Call("allgather_object", stand_in=StandIn(objects=True)))
        with self.waiting():
            return self._gather_objects(data)

    def gather_object(self, value: Any, root_rank: int = 0) -> list[Any] | None:
        """Return the picklable values of all ranks on `root_rank`, and None on the others.

        Raises:
            TypeError: If this rank's value cannot be pickled. All other ranks get a `MismatchError`.
        """
        root = self.check_root(root_rank, "gather_object")
        data = self._picklable(value, "gather_object")
        self.agree(Call("gather_object", (f"root_rank={root_rank}",)))
        with self.waiting():
            values = self._gather_objects(data)
        return values if self.rank == root else None

    def broadcast_object(self, value: Any = None, root_rank: int = 0) -> Any:
        """Return the picklable value of `root_rank` on every rank; what the others pass is ignored.

        Raises:
            TypeError: On `root_rank`, if its value cannot be pickled. All other ranks get a `MismatchError`.
        """
        root = self.check_root(root_rank, "broadcast_object")
        data = self._picklable(value, "broadcast_object") if self.rank == root else np.empty(0, np.uint8)
        self.agree(Call("broadcast_object", (f"root_rank={root_rank}",)))
        with self.waiting():
            length = int(self._broadcast(np.array([len(data)]), root)[0])
            buffer = data if self.rank == root else np.empty(length, np.uint8)
            data = self._broadcast(buffer, root)
        return pickle.loads(data.data)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.agree(Call("barrier", stand_in=StandIn()))

    def join(self) -> int:
        """Let the other ranks finish their batches: until all have called this, zeros are sent for this one.

        A mean still divides by the number of all ranks, those that have joined included. Sums, means, gathers
        (to which this rank adds nothing) and barriers go on; any other operation raises on all ranks.

        Returns:
            The rank that joined last; of several, the highest.

        Raises:
            MismatchError: On every rank, if another operation needs this rank.
        """
        self._catch_up()
        last = join.wait_for_all(self)
        self.has_joined = True
        return last

    def subset(self, ranks: Sequence[int]) -> "Engine | None":
        """Make an engine for a process set. All ranks of this one call it, with the same ranks.

        Args:
            ranks: Which ranks take part, without repetition; their order in the set is theirs in the world.

        Returns:
            An engine like this one on the ranks that take part, None on the others.

        Raises:
            ValueError: If there are no such ranks.
            MismatchError: If the ranks do not ask for the same set.
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
            part._among = ranks_text(part.ranks).encode()
        return part

    def check_root(self, root_rank: int, function: str) -> int:
        """Return the place of a rank among those that take part; raises ValueError if it is not one of them."""
        if root_rank not in self.ranks:
            raise ValueError(
                f"{function}: root_rank must be a rank that takes part: {ranks_text(self.ranks)}. "
                f"Received: root_rank={root_rank}."
            )
        return self.ranks.index(root_rank)

    def tell(self, what: str, error: BaseException) -> None:
        """Let all other ranks know, at whatever they do together next, why this one does not come.

        They get a `MismatchError` that quotes the error. Nothing is told of an error that all ranks know.

        Args:
            what: What raised the error.
            error: The error, which the caller raises.
        """
        if self.size == 1 or self.is_known(error):
            return
        mark(error, Known.ORIGINAL)
        words = " ".join(str(error).split())
        if len(words) > _MOST_WORDS:  # TensorFlow puts the cause behind a long stack
            words = f"{words[: _MOST_WORDS // 3]} … {words[-_MOST_WORDS * 2 // 3 :]}"
        with contextlib.suppress(MismatchError):
            self.agree(Call(f"{what} raised {type(error).__name__}: {words}", farewell=True))

    def is_known(self, error: BaseException) -> bool:
        """Return whether all ranks know of an error, be it within one that TensorFlow made of it."""
        error = self.original(error)
        return isinstance(error, MismatchError) or known(error) is not None

    def original(self, error: BaseException) -> BaseException:
        """Return the error of this engine of which TensorFlow has made another one, or `error` itself."""
        hidden = self.last_error
        # TensorFlow hands on nothing but the text, with text of its own around it.
        return hidden if hidden is not None and str(hidden) in str(error) else error

    def say(self, sentence: str) -> None:
        """Log a message for a person, on rank 0 only; see `hvdtrain.messages`."""
        if self.rank == 0:
            logger.info(sentence)

    def warn(self, sentence: str) -> None:
        """Log a warning for a person, on rank 0 only; see `hvdtrain.messages`."""
        if self.rank == 0:
            logger.warning(sentence)

    def agree(self, call: Call, wish: int = 0) -> int:
        """Make sure that all ranks make this call now, before any of them may wait for another.

        Args:
            call: What this rank is about to do.
            wish: A number of which all ranks learn the largest, at no further cost.

        Returns:
            The largest wish of all ranks.

        Raises:
            MismatchError: On every rank, if one rank's call differs; the message names ranks and calls.
        """
        if self.closed:
            raise ValueError(
                f"{call.kind}: hvd.shutdown() was called. Call hvd.init() again, and wrap the optimizer again."
            )
        self._catch_up()
        self._doing, self._where = call.kind, call.where
        with self.span(f"NEGOTIATE_{_PHASES.get(call.kind, 'ALLREDUCE')}"):
            if self.size == 1:
                return wish
            same, largest = self._compared(call.digest, wish)
            if not same:
                join.settle(self, call)
            return largest

    def _catch_up(self) -> None:
        """Wait for what a step that was broken off has left at work, before the ranks are asked anything else."""
        if self.beside is not None and self.beside.is_busy and not self.beside.is_here:
            self.beside.finish()

    def leave_to_core(self) -> None:
        """Note that the engine's own graph operations now do what the ranks have agreed on."""
        heartbeat.left_to_core(self._where, self._among)

    def _picklable(self, value: Any, function: str) -> np.ndarray:
        """Pickle a value before any rank waits for it; where that fails, all ranks learn why."""
        try:
            return _pickled(value)
        except Exception as error:
            raised = TypeError(
                f"{function}: expected an object that can be pickled. Received: an object of type "
                f"{type(value).__name__}, of which pickle says: {error}"
            )
            self.tell(function, raised)
            raise raised from error

    def _gather_objects(self, data: np.ndarray) -> list[Any]:
        """Return the objects of all ranks, of which `data` holds this rank's, pickled."""
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

    def span(self, phase: str) -> AbstractContextManager[Any]:
        """Note a phase of the operation in hand: in the heartbeat, and in the timeline while one is written."""
        timeline = self.timeline  # another thread may end it
        if timeline is None:
            return self.waiting()
        whose = f" of {ranks_text(self.ranks)}" if self._members else ""
        both = contextlib.ExitStack()
        both.enter_context(timeline.span(self._doing + whose, phase))
        both.enter_context(self.waiting())
        return both

    def waiting(self) -> AbstractContextManager[Any]:
        """Note for who may ask that this rank is in the operation in hand and needs the others."""
        return heartbeat.Waiting(self._where, self._among) if self.size > 1 else contextlib.nullcontext()


@functools.lru_cache(1024)  # to put it into words takes longer than a small sum
def _allreduce(dtype: np.dtype, shape: tuple[int, ...], op: Op) -> Call:
    stand_in = StandIn(((dtype.name, shape),), op=op)
    return Call("allreduce", (f"{dtype} of shape {shape}, op={op.name.lower()}",), stand_in=stand_in)


def _stand_in(arrays: Sequence[np.ndarray], op: Op) -> StandIn:
    return StandIn(tuple((each.dtype.name, each.shape) for each in arrays), op=op)


def _pickled(value: Any) -> np.ndarray:
    # Functions defined in a script travel too, as they do with Horovod.
    return np.frombuffer(cloudpickle.dumps(value), np.uint8)
