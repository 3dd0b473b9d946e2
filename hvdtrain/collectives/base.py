"""The wire: what every engine can do, and the agreement of all ranks that precedes each operation.

The public methods are the same for all engines: they check their arguments, make sure that every rank
asks for the same thing, and then hand contiguous buffers to the few methods that an engine implements.
"""

import enum
import hashlib
import pickle
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hvdtrain.collectives import fusion


class MismatchError(ValueError):
    """The ranks do not ask for the same thing. Raised on every rank, with the same explanation."""


class Op(enum.IntEnum):
    """What a reduction does with the values of all ranks; the numbers are Horovod's."""

    AVERAGE = 0
    SUM = 1
    MIN = 3
    MAX = 4
    PRODUCT = 5

    @classmethod
    def of(cls, op: "Op | int | str") -> "Op":
        """Reads an operation from a constant, its number or its name."""
        try:
            return cls[op.upper()] if isinstance(op, str) else cls(op)
        except (KeyError, ValueError):
            known = ", ".join(member.name.lower() for member in cls)
            raise ValueError(f"Unknown reduction op={op!r}; expected one of: {known}.") from None


@dataclass(frozen=True)
class Call:
    """One request to a collective, in words, so that ranks can compare what they ask for.

    Args:
        kind: Name of the operation.
        details: One line for each thing that must be the same on all ranks.
        shown: The same lines as a person should read them, where they hold more than what must be the same.
    """

    kind: str
    details: tuple[str, ...] = ()
    shown: tuple[str, ...] = field(default=(), compare=False)
    digest: int = field(init=False)

    def __post_init__(self) -> None:
        text = "\n".join((self.kind, *self.details)).encode()
        value = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        object.__setattr__(self, "digest", value)


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


_REDUCIBLE = {
    *("float16", "bfloat16", "float32", "float64"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"),
}


class Engine(ABC):
    """Collective operations on NumPy arrays over all ranks of one world.

    Every operation must be called by all ranks, in the same order, with arguments that fit together; if
    they do not, all ranks raise `MismatchError` and the message tells who asked for what.
    """

    name: str
    library: str
    world: World
    closed: bool = False
    last_error: Exception | None = None  # what a graph's executor wraps so deep that nobody would find it

    @property
    def rank(self) -> int:
        """Number of this process, from 0 to size - 1."""
        return self.world.rank

    @property
    def size(self) -> int:
        """Number of processes in the world."""
        return self.world.size

    # What an engine implements.

    @abstractmethod
    def _same_everywhere(self, number: int) -> bool:
        """Tells on all ranks alike whether all passed the same number of at most 63 bits."""

    @abstractmethod
    def _reduce(self, send: np.ndarray, receive: np.ndarray, op: Op) -> None:
        """Reduces `send` over all ranks into `receive`, which may be `send` itself; never AVERAGE."""

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
    def shutdown(self) -> None:
        """Gives back what the engine holds; no operation may follow."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """Ends the processes of all ranks at once with this exit code."""

    def native_tensors(self) -> Any:
        """Returns the engine's own graph operations on framework tensors, or None if it has none."""
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
        array, op = _reducible(array, Op.of(op), "allreduce")
        self.agree(Call("allreduce", (f"{_described(array)}, op={op.name.lower()}",)))
        if out is None:
            out = np.empty_like(array, order="C")
        elif out.shape != array.shape or out.dtype != array.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"allreduce: `out` must be a contiguous array like `array`, {_described(array)}. "
                f"Received: {_described(out)}."
            )
        if array.ctypes.data == out.ctypes.data:
            array = out
        elif np.may_share_memory(array, out):
            array = array.copy()
        self._finish(array, out, op)
        return out

    def grouped_allreduce(
        self, arrays: Sequence[Any], op: Op | int | str = Op.AVERAGE, call: Call | None = None
    ) -> list[np.ndarray]:
        """Combines many arrays at the price of a few operations: small ones travel together.

        Args:
            arrays: Arrays as for `allreduce`, of any shapes and dtypes, the same list on all ranks.
            op: As for `allreduce`.
            call: What the ranks compare before they start; built from the arrays by default. A caller that
                reduces the same arrays in each step builds it once and can name the arrays in it.

        Returns:
            New arrays of the shapes and dtypes of `arrays`. They may share memory with each other.

        Raises:
            TypeError: If a dtype cannot be reduced this way.
            MismatchError: If the ranks do not call this alike.
        """
        op = Op.of(op)
        operands = [_reducible(array, op, "grouped_allreduce")[0] for array in arrays]
        self.agree(
            call or Call("grouped_allreduce", (op.name.lower(), *(_described(each) for each in operands)))
        )
        results: list[Any] = [None] * len(operands)
        for bucket in fusion.plan(operands):
            if len(bucket) == 1:
                (index,) = bucket
                results[index] = fusion.aligned_like(operands[index])
                self._finish(operands[index], results[index], op)
            else:
                buffer, slots = fusion.pack([operands[index] for index in bucket])
                self._finish(buffer, buffer, op)
                for index, slot in zip(bucket, slots, strict=True):
                    results[index] = slot
        return results

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
        array = _operand(array, "allgather")
        array = array.reshape(1) if array.ndim == 0 else array
        self.agree(Call("allgather", (f"{array.dtype} of shape (any, {_inner(array)})",)))
        return self._gather(array)[0]

    def broadcast(self, array: Any, root_rank: int = 0) -> np.ndarray:
        """Gives every rank the array of one.

        Args:
            array: Array of the same shape and dtype on all ranks.
            root_rank: The rank whose values all receive.

        Returns:
            New array with the values of `root_rank`.

        Raises:
            ValueError: If there is no such rank.
            MismatchError: If shape, dtype or root_rank differ between ranks.
        """
        array = _operand(array, "broadcast")
        self.check_root(root_rank, "broadcast")
        self.agree(Call("broadcast", (f"{_described(array)}, root_rank={root_rank}",)))
        return self._broadcast(array, root_rank)

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
        array, op = _reducible(array, Op.of(op), "reducescatter")
        if array.ndim == 0:
            raise ValueError(
                "reducescatter: expected an array with at least one dimension to split. Received a scalar."
            )
        self.agree(Call("reducescatter", (f"{_described(array)}, op={op.name.lower()}",)))
        rows = [len(array) // self.size + (rank < len(array) % self.size) for rank in range(self.size)]
        wide = array.astype(_carrier(array.dtype, op), copy=False)
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
            rows came from each.

        Raises:
            ValueError: If `splits` does not fit the array.
            MismatchError: If dtype or later dimensions differ between ranks.
        """
        array = _operand(array, "alltoall")
        splits = self._splits(array, splits)
        self.agree(Call("alltoall", (f"{array.dtype} of shape (any, {_inner(array)})",)))
        received, counts = self._exchange(array, splits)
        return received, np.array(counts, np.int32)

    def allgather_object(self, value: Any) -> list[Any]:
        """Returns the picklable values of all ranks, in the order of the ranks, on every rank."""
        self.agree(Call("allgather_object"))
        return self._gather_objects(value)

    def gather_object(self, value: Any, root_rank: int = 0) -> list[Any] | None:
        """Returns the picklable values of all ranks on `root_rank`, and None on the others."""
        self.check_root(root_rank, "gather_object")
        self.agree(Call("gather_object", (f"root_rank={root_rank}",)))
        values = self._gather_objects(value)
        return values if self.rank == root_rank else None

    def broadcast_object(self, value: Any = None, root_rank: int = 0) -> Any:
        """Returns the picklable value of `root_rank` on every rank; what the others pass is ignored."""
        self.check_root(root_rank, "broadcast_object")
        self.agree(Call("broadcast_object", (f"root_rank={root_rank}",)))
        data = _pickled(value) if self.rank == root_rank else np.empty(0, np.uint8)
        length = int(self._broadcast(np.array([len(data)]), root_rank)[0])
        buffer = data if self.rank == root_rank else np.empty(length, np.uint8)
        return pickle.loads(self._broadcast(buffer, root_rank).tobytes())

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        self.agree(Call("barrier"))

    def check_root(self, root_rank: int, function: str) -> None:
        """Raises ValueError, in the name of `function`, if there is no such rank."""
        if not 0 <= root_rank < self.size:
            raise ValueError(
                f"{function}: root_rank must be a rank of this world, 0 to {self.size - 1}. "
                f"Received: root_rank={root_rank}."
            )

    def say(self, sentence: str) -> None:
        """Prints one line for a person, on rank 0 only, where output of the script cannot swallow it."""
        if self.rank == 0:
            print(f"hvdtrain: {sentence}", file=sys.stderr, flush=True)

    def agree(self, call: Call) -> None:
        """Makes sure that all ranks make this call now, before any of them may wait for another.

        Args:
            call: What this rank is about to do.

        Raises:
            MismatchError: On every rank, if one rank's call differs; the message names ranks and calls.
        """
        if self.closed:
            raise ValueError(
                f"{call.kind}: hvd.shutdown() was called. Call hvd.init() again, and wrap the optimizer again."
            )
        if self.size > 1 and not self._same_everywhere(call.digest):
            raise MismatchError(_explained(self._gather_objects(call)))

    def _gather_objects(self, value: Any) -> list[Any]:
        joined, lengths = self._gather(_pickled(value))
        ends = np.cumsum(lengths)
        return [
            pickle.loads(joined[end - length : end].tobytes())
            for end, length in zip(ends, lengths, strict=True)
        ]

    def _finish(self, send: np.ndarray, receive: np.ndarray, op: Op) -> None:
        """Reduces and averages, in a wider type where the sum would lose something."""
        plain = Op.SUM if op is Op.AVERAGE else op
        carrier = _carrier(send.dtype, op)
        if carrier != send.dtype:
            wide = send.astype(carrier)
            self._reduce(wide, wide, plain)
            receive[...] = self._averaged(wide, op)
        else:
            self._reduce(send, receive, plain)
            self._averaged(receive, op)

    def _averaged(self, total: np.ndarray, op: Op) -> np.ndarray:
        """Turns a sum into a mean, in place; integers are rounded toward zero, as Horovod does."""
        if op is Op.AVERAGE and self.size > 1:
            if total.dtype.kind in "iu":
                total -= np.fmod(total, total.dtype.type(self.size))
                total //= total.dtype.type(self.size)
            else:
                np.divide(total, total.dtype.type(self.size), out=total)
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


def _operand(array: Any, function: str) -> np.ndarray:
    if np.ma.isMaskedArray(array):
        raise TypeError(
            f"{function}: a masked array would lose its mask. Send its data and its mask, or fill it."
        )
    array = np.asarray(array, order="C")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.hasobject:
        raise TypeError(
            f"{function}: arrays of Python objects cannot travel. Received dtype {array.dtype}. "
            "Use broadcast_object or allgather_object."
        )
    return array


def _reducible(array: Any, op: Op, function: str) -> tuple[np.ndarray, Op]:
    array = _operand(array, function)
    if array.dtype.name not in _REDUCIBLE:
        raise TypeError(
            f"{function}: cannot reduce dtype {array.dtype}. Expected one of: {', '.join(sorted(_REDUCIBLE))}."
        )
    if array.dtype == np.bool_ and op in (Op.SUM, Op.AVERAGE):
        raise TypeError(
            f"{function}: {op.name.lower()} of bool is not defined. Use max (any), min (all), or cast to int32."
        )
    return array, op


def _carrier(dtype: np.dtype, op: Op) -> np.dtype:
    """Returns the dtype in which values are summed: 16-bit floats lose bits, means of small integers overflow."""
    if dtype.name in ("float16", "bfloat16"):
        return np.dtype(np.float32)
    if op is Op.AVERAGE and dtype.kind in "iu" and dtype.itemsize < 8:
        return np.dtype(np.int64)
    return dtype


def _described(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _inner(array: np.ndarray) -> str:
    return ", ".join(str(dimension) for dimension in array.shape[1:])


def _pickled(value: Any) -> np.ndarray:
    return np.frombuffer(pickle.dumps(value), np.uint8)


def _explained(calls: Sequence[Call]) -> str:
    """Says in one message who asked for what, beginning with the first difference between two ranks."""
    other = next(rank for rank, call in enumerate(calls) if call != calls[0])
    sides = _first_difference(calls[0], calls[other])
    like_first = [rank for rank, call in enumerate(calls) if call == calls[0]]
    unlike = [rank for rank, call in enumerate(calls) if call != calls[0]]
    return (
        f"The ranks do not agree on their next operation ({calls[0].kind}).\n"
        f"  {ranks_text(like_first)}: {sides[0]}\n"
        f"  rank {other}: {sides[1]}\n"
        f"  ({ranks_text(unlike)} differ{'s' if len(unlike) == 1 else ''} from rank 0.)\n"
        "Every rank must run the same operations in the same order on the same model. Look for a condition "
        "on the rank, a layer that is frozen or missing on some ranks, or data that ends earlier on some."
    )


def _first_difference(ours: Call, theirs: Call) -> tuple[str, str]:
    if ours.kind != theirs.kind:
        return ours.kind, theirs.kind
    index = next(
        (i for i, pair in enumerate(zip(ours.details, theirs.details, strict=False)) if pair[0] != pair[1]),
        min(len(ours.details), len(theirs.details)),
    )
    first, second = ((call.shown or call.details)[index:][:1] for call in (ours, theirs))
    return "".join(first) or "nothing more", "".join(second) or "nothing more"


def ranks_text(ranks: Sequence[int]) -> str:
    """Writes a list of ranks as people say it: 'rank 3', 'ranks 0-2, 5'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
