"""The wire: what every engine can do, and the agreement of all ranks that precedes each operation.

The public methods are the same for all engines: they check their arguments, make sure that every rank
asks for the same thing, and then hand contiguous buffers to the few methods that an engine implements.
"""

import contextlib
import functools
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from hvdtrain import heartbeat
from hvdtrain.collectives import adasum, fusion
from hvdtrain.collectives.agreement import (
    JOIN,
    Call,
    Known,
    MismatchError,
    StandIn,
    explained,
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
    told_of_zeros = False  # set on the class: True once a warning of integer means was given
    has_joined = False  # True once all ranks have called `join`, some of them maybe earlier than others
    _members: tuple[int, ...] | None = None
    _joined: tuple[int, ...] = ()
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
        """Tells on all ranks alike whether all passed the same number of at most 63 bits, and the largest wish."""

    @abstractmethod
    def _reduce(self, send: np.ndarray, receive: np.ndarray, op: Op) -> None:
        """Reduces `send` over all ranks into `receive`, which may be `send` itself; never ADASUM."""

    @abstractmethod
    def _gather(self, array: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Joins all ranks' arrays along the first dimension; also returns each rank's first dimension."""

    @abstractmethod
    def _broadcast(self, array: np.ndarray, root_rank: int) -> np.ndarray:
        """Returns root_rank's array; the others' has the same shape and dtype."""

    @abstractmethod
    def _reduce_scatter(self, array: np.ndarray, rows: Sequence[int], op: Op) -> np.ndarray:
        """Reduces over all ranks and returns this rank's `rows[rank]` rows of the result; never AVERAGE."""

    @abstractmethod
    def _exchange(self, array: np.ndarray, splits: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """Sends `splits[r]` rows to each rank r; returns what came and how many rows from whom."""

    @abstractmethod
    def _subset(self, ranks: Sequence[int]) -> "Engine | None":
        """Makes an engine for some of the ranks; None on the others. All ranks call this."""

    @abstractmethod
    def shutdown(self) -> None:
        """Gives back what the engine holds; no operation may follow."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """Ends the processes of all ranks at once with this exit code."""

    def _reduce_all(self, pairs: Sequence[Pair], op: Op) -> None:
        """Reduces arrays of one dtype, each as `_reduce` does; an engine may take them as one."""
        for send, receive in pairs:
            self._reduce(send, receive, op)

    def native_tensors(self) -> Any:
        """Returns the engine's own graph operations on framework tensors, or None if it has none."""
        return None

    def native_timeline(self, path: Path, mark_cycles: bool) -> Callable[[], None] | None:
        """Lets the engine's own core record to a file; returns what ends that, or None where it has no core."""
        return None

    # What a caller uses.

    def allreduce(
        self, array: Any, op: Op | int | str = Op.AVERAGE, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Combines one array over all ranks, with the same result, to the bit, on each.

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
        self._finish([(array, out)], op)
        return out

    def grouped_allreduce(
        self,
        arrays: Sequence[Any],
        op: Op | int | str = Op.AVERAGE,
        call: Call | None = None,
        in_place: Sequence[bool] = (),
    ) -> list[np.ndarray]:
        """Combines many arrays at the price of a few operations: small ones travel together.

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
        return self._combined(operands, op, in_place or [False] * len(operands))

    def allgather(self, array: Any) -> np.ndarray:
        """Joins the arrays of all ranks along their first dimension, in the order of the ranks.

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
        """Gives every rank the array of one.

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
        with self._span("BROADCAST"):
            return self._broadcast(array, root)

    def reducescatter(self, array: Any, op: Op | int | str = Op.AVERAGE) -> np.ndarray:
        """Combines one array over all ranks and gives each rank its part of the rows.

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
        rows = self._parts(len(array))
        wide = array.astype(carrier(array.dtype, op), copy=False)
        with self._span("REDUCESCATTER"):
            mine = self._reduce_scatter(wide, rows, Op.SUM if op is Op.AVERAGE else op)
        return self._averaged(mine, op).astype(array.dtype, copy=False)

    def alltoall(self, array: Any, splits: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sends a part of the rows to each rank and receives a part from each.

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
        with self._span("ALLTOALL"):
            received, counts = self._exchange(array, splits)
        return received, np.array(counts, np.int32 if max(counts) < 1 << 31 else np.int64)

    def allgather_object(self, value: Any) -> list[Any]:
        """Return the picklable values of all ranks, in their order, on every rank; of one that joined, None.

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
        root = self.check_root(root_rank, "gather_object")
        data = self._picklable(value, "gather_object")
        self.agree(Call("gather_object", (f"root_rank={root_rank}",)))
        with self._waiting():
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
        with self._waiting():
            length = int(self._broadcast(np.array([len(data)]), root)[0])
            buffer = data if self.rank == root else np.empty(length, np.uint8)
            data = self._broadcast(buffer, root)
        return pickle.loads(data.data)

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        self.agree(Call("barrier", stand_in=StandIn()))

    def join(self) -> int:
        """Lets the other ranks finish their batches: until all have called this, zeros are sent for this one.

        A mean still divides by the number of all ranks, those that have joined included. Sums, means, gathers
        (to which this rank adds nothing) and barriers go on; any other operation raises on all ranks.

        Returns:
            The rank that joined last; of several, the highest.

        Raises:
            MismatchError: On every rank, if another operation needs this rank.
        """
        self._catch_up()
        while self.size > 1 and not self._all_have_joined():
            self._stand_in_for(self._settled(JOIN))
        late = set(self.ranks) - set(self._joined) or set(self.ranks)
        self._joined, self.has_joined = (), True
        return max(late)

    def subset(self, ranks: Sequence[int]) -> "Engine | None":
        """Makes an engine for a process set. All ranks of this one call it, with the same ranks.

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
        """Returns the place of a rank among those that take part; raises ValueError if it is not one of them."""
        if root_rank not in self.ranks:
            raise ValueError(
                f"{function}: root_rank must be a rank that takes part: {ranks_text(self.ranks)}. "
                f"Received: root_rank={root_rank}."
            )
        return self.ranks.index(root_rank)

    def tell(self, what: str, error: BaseException) -> None:
        """Lets all other ranks know, at whatever they do together next, why this one does not come.

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
        """Tells whether all ranks know of an error, be it within one that TensorFlow made of it."""
        error = self.original(error)
        return isinstance(error, MismatchError) or known(error) is not None

    def original(self, error: BaseException) -> BaseException:
        """Returns the error of this engine of which TensorFlow has made another one, or `error` itself."""
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
        """Makes sure that all ranks make this call now, before any of them may wait for another.

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
        with self._span(f"NEGOTIATE_{_PHASES.get(call.kind, 'ALLREDUCE')}"):
            if self.size == 1:
                return wish
            same, largest = self._compared(call.digest, wish)
            if not same:
                self._settled(call)
            return largest

    def _catch_up(self) -> None:
        """Waits for what a step that was broken off has left at work, before the ranks are asked anything else."""
        if self.beside is not None and self.beside.is_busy and not self.beside.is_here:
            self.beside.finish()

    def leave_to_core(self) -> None:
        """Notes that the engine's own graph operations now do what the ranks have agreed on."""
        heartbeat.left_to_core(self._where, self._among)

    def _settled(self, call: Call) -> Call:
        """Finds out what the ranks will do that do not all ask for the same: only those that joined may not.

        Args:
            call: What this rank asks for.

        Returns:
            What all ranks do now that have not joined.
        """
        calls = self._gather_objects(_pickled(call))
        self._joined = tuple(rank for rank, each in zip(self.ranks, calls, strict=True) if each == JOIN)
        working = [each for each in calls if each != JOIN]
        stand_in = working[0].stand_in if self._joined else None
        if stand_in is None or not stand_in.possible or any(each != working[0] for each in working):
            error = MismatchError(explained(calls, self.ranks))
            if any(each.farewell for each in calls) and not call.farewell:
                mark(error, Known.REPORTED)
            raise error
        return working[0]

    def _stand_in_for(self, call: Call) -> None:
        """Takes part in what the others do, with zeros and without rows."""
        work = call.stand_in or StandIn()
        if work.native:
            self.native_tensors().stand_in(call.kind, work)
            return
        if work.objects:
            self._gather_objects(_pickled(None))
        zeros = [np.zeros(shape, dtype) for dtype, shape in work.reduced]
        self._combined(zeros, work.op, [True] * len(zeros))
        for dtype, shape in work.gathered:
            self._gather(np.zeros((0, *shape), dtype))

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

    def _combined(self, operands: Sequence[np.ndarray], op: Op, in_place: Sequence[bool]) -> list[np.ndarray]:
        results: list[Any] = [each if stays else None for each, stays in zip(operands, in_place, strict=True)]
        pairs: list[Pair] = []
        packed: list[tuple[int, np.ndarray]] = []
        for bucket in fusion.plan(operands):
            if len(bucket) == 1 or op is Op.ADASUM:  # Adasum looks at each array by itself
                for index in bucket:
                    if results[index] is None:
                        results[index] = fusion.aligned_like(operands[index])
                    pairs.append((operands[index], results[index]))
                continue
            with self._span("MEMCPY_IN_FUSION_BUFFER"):
                buffer, slots = fusion.pack([operands[index] for index in bucket])
            pairs.append((buffer, buffer))
            packed += zip(bucket, slots, strict=True)
        self._finish(pairs, op)
        for index, slot in packed:
            if results[index] is None:
                results[index] = slot
            else:
                results[index][...] = slot
        return results

    def _finish(self, pairs: Sequence[Pair], op: Op) -> None:
        """Reduces and averages, in a wider type where the sum would lose something."""
        with self._span("ALLREDUCE"):
            alike: dict[np.dtype, list[Pair]] = {}
            for send, receive in pairs:
                whole_numbers = op is Op.AVERAGE and send.dtype.kind in "iu"
                if whole_numbers or op is Op.ADASUM or carrier(send.dtype, op) != send.dtype:
                    self._finish_wide(send, receive, op)
                else:
                    alike.setdefault(send.dtype, []).append((send, receive))
            for members in alike.values():
                self._reduce_all(members, op)

    def _finish_wide(self, send: np.ndarray, receive: np.ndarray, op: Op) -> None:
        wide = carrier(send.dtype, op)
        if op is Op.ADASUM:
            receive[...] = adasum.combined(send.astype(wide), self.rank, self.size, self._swapped)
        elif fusion.worth_halving(send, op):
            receive[...] = self._halved(send, op)
        elif op is Op.AVERAGE and wide.kind in "iu":
            total = send.astype(wide)
            self._reduce(total, total, Op.SUM)
            receive[...] = self._averaged(total.copy(), op)
            self._tell_of_zeros(total, receive)
        else:
            copy = send.astype(wide)
            self._reduce(copy, copy, op)
            with np.errstate(over="ignore"):  # what is too large becomes infinite, as in any sum of floats
                receive[...] = copy

    def _tell_of_zeros(self, total: np.ndarray, mean: np.ndarray) -> None:
        """Warn once where a mean of integers, which is an integer, has become 0."""
        lost = total[(mean == 0) & (total != 0)]
        if lost.size and not Engine.told_of_zeros:
            Engine.told_of_zeros = True
            self.warn(
                f"a mean of integers was rounded to 0: the sum {lost[0]} of {self.size} ranks, divided by "
                f"{self.size}. Pass floats, as in hvd.allreduce(tf.cast(x, tf.float32)), or op=hvd.Sum."
            )

    def _halved(self, array: np.ndarray, op: Op) -> np.ndarray:
        """Sums 16-bit floats in float32 while only 16-bit floats travel: each rank sums one part of the array."""
        received, _ = self._exchange(array.reshape(-1), self._parts(array.size))
        total = received.reshape(self.size, -1).astype(np.float32).sum(axis=0)
        return self._gather(self._averaged(total, op).astype(array.dtype))[0].reshape(array.shape)

    def _swapped(self, array: np.ndarray, partner: int) -> np.ndarray:
        """Returns the array that another rank passes, which must be of the same shape."""
        flat = array.reshape(-1)
        splits = [flat.size if rank == partner else 0 for rank in range(self.size)]
        return self._exchange(flat, splits)[0].reshape(array.shape)

    def _reduce_and_take(self, array: np.ndarray, rows: Sequence[int], op: Op) -> np.ndarray:
        """Reduces whole arrays and returns this rank's rows, where an engine cannot scatter them."""
        whole = np.empty_like(array)
        self._reduce(array, whole, op)
        start = sum(rows[: self.rank])
        return whole[start : start + rows[self.rank]].copy()

    def _averaged(self, total: np.ndarray, op: Op) -> np.ndarray:
        """Turns a sum into a mean, in place; integers are rounded toward zero, as Horovod does."""
        if op is Op.AVERAGE and self.size > 1:
            if total.dtype.kind in "iu":
                total -= np.fmod(total, total.dtype.type(self.size))
                total //= total.dtype.type(self.size)
            elif self.size & (self.size - 1):
                np.divide(total, total.dtype.type(self.size), out=total)
            else:  # as exact, and faster
                np.multiply(total, total.dtype.type(1 / self.size), out=total)
        return total

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

    def _parts(self, count: int) -> list[int]:
        """Divides a number of rows among the ranks; the first ones get one more where it does not divide."""
        return [count // self.size + (rank < count % self.size) for rank in range(self.size)]

    def _span(self, phase: str) -> AbstractContextManager[Any]:
        """Notes a phase of the operation in hand: in the heartbeat, and in the timeline while one is written."""
        timeline = self.timeline  # another thread may end it
        if timeline is None:
            return self._waiting()
        whose = f" of {ranks_text(self.ranks)}" if self._members else ""
        both = contextlib.ExitStack()
        both.enter_context(timeline.span(self._doing + whose, phase))
        both.enter_context(self._waiting())
        return both

    def _waiting(self) -> AbstractContextManager[Any]:
        """Notes for who may ask that this rank is in the operation in hand and needs the others."""
        return heartbeat.Waiting(self._where, self._among) if self.size > 1 else contextlib.nullcontext()

    def _all_have_joined(self) -> bool:
        self._where = JOIN.where
        with self._waiting():
            return self._compared(JOIN.digest)[0]


@functools.lru_cache(1024)  # to put it into words takes longer than a small sum
def _allreduce(dtype: np.dtype, shape: tuple[int, ...], op: Op) -> Call:
    stand_in = StandIn(((dtype.name, shape),), op=op)
    return Call("allreduce", (f"{dtype} of shape {shape}, op={op.name.lower()}",), stand_in=stand_in)


def _stand_in(arrays: Sequence[np.ndarray], op: Op) -> StandIn:
    return StandIn(tuple((each.dtype.name, each.shape) for each in arrays), op=op)


def _pickled(value: Any) -> np.ndarray:
    # Functions defined in a script travel too, as they do with Horovod.
    return np.frombuffer(cloudpickle.dumps(value), np.uint8)
