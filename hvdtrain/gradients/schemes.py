"""Define how gradients are reduced over the ranks, and how they are compressed before they are sent."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hvdtrain.collectives.engine import Call, Engine, Op

# Prefixes of `State.named`.
ERRORS, _SHARED = "errors/", "shared/"


@dataclass
class State:
    """What a scheme remembers between the steps of one optimizer; checkpoints contain it.

    Args:
        errors: By `Group.keys`, the part of this rank's gradients that has not been applied yet.
        shared: Other arrays by names that the scheme chooses, the same on all ranks.
    """

    errors: dict[str, np.ndarray] = field(default_factory=dict)
    shared: dict[str, np.ndarray] = field(default_factory=dict)
    _scratch: dict[str, np.ndarray] = field(default_factory=dict)

    def named(self) -> dict[str, np.ndarray]:
        """Return all arrays, by names that start with the name of their dict."""
        errors = {f"{ERRORS}{key}": error for key, error in self.errors.items()}
        return errors | {f"{_SHARED}{name}": array for name, array in self.shared.items()}

    def replace(self, named: Mapping[str, np.ndarray]) -> None:
        """Replace all arrays by copies of others, named as by `named`."""
        for prefix, arrays in ((ERRORS, self.errors), (_SHARED, self.shared)):
            arrays.clear()
            arrays.update(
                (name.removeprefix(prefix), np.array(array))
                for name, array in named.items()
                if name.startswith(prefix)
            )

    def scratch(self, name: str, size: int, dtype: Any) -> np.ndarray:
        """Return a flat array of any content, the same memory in each step: new memory costs more than one pass."""
        bytes_needed = size * np.dtype(dtype).itemsize
        memory = self._scratch.get(name, np.empty(0, np.uint8))
        if len(memory) < bytes_needed:
            memory = self._scratch[name] = np.empty(bytes_needed, np.uint8)
        return memory[:bytes_needed].view(dtype)

    def count(self, name: str) -> int:
        """Return how often this has been called with a name."""
        count = self.shared.setdefault(f"count/{name}", np.array(-1))
        count += 1
        return int(count)


@dataclass(frozen=True)
class Group:
    """Dense gradients of one step that are reduced together.

    Args:
        arrays: Arrays of the same shapes and dtypes on all ranks; read-only unless `in_place`.
        op: SUM, AVERAGE or ADASUM.
        keys: The name of each array, the same in all steps and on all ranks.
        in_place: For each array whether it may be overwritten.
        call: The call that the ranks compare before they start: the first operation of a scheme takes it, or the
            scheme passes it to `engine.agree`. None for all groups of a step but the first.
        out: For each array where its result may be written, or None. The memory may be that of the array, but not
            if errors are wanted.
        wants_errors: Whether the result must contain `errors`.
        errors: Of a result, for each array the part of this rank's array that is not in it, None if nothing was
            left out. The sum over the ranks of arrays and errors does not change: what is left out here is
            missing there.
    """

    arrays: Sequence[np.ndarray]
    op: Op
    keys: Sequence[str] = ()
    in_place: Sequence[bool] = ()
    call: Call | None = None
    out: Sequence[np.ndarray | None] = ()
    wants_errors: bool = False
    errors: Sequence[np.ndarray | None] = ()

    def with_arrays(self, arrays: Sequence[np.ndarray], errors: Sequence[np.ndarray | None] = ()) -> "Group":
        """Return the group with new arrays, which may be overwritten, and what they lack."""
        return replace(self, arrays=arrays, in_place=[True] * len(arrays), errors=errors)

    def part(self, indices: Sequence[int], call: Call | None) -> "Group":
        """Return some of the arrays as a group."""
        return replace(
            self,
            arrays=[self.arrays[index] for index in indices],
            keys=[self.keys[index] for index in indices],
            in_place=[self.in_place[index] for index in indices],
            out=[self.out[index] for index in indices] if self.out else (),
            call=call,
        )

    def result(self, index: int, dtype: Any = None) -> np.ndarray:
        """Return an array of any content for the result of an array, of its shape."""
        array = self.arrays[index]
        dtype = np.dtype(dtype or array.dtype)
        given = self.out[index] if self.out else None
        return given if given is not None and given.dtype == dtype else np.empty(array.shape, dtype)

    def writable(self) -> list[np.ndarray]:
        """Return the arrays; those that may not be overwritten are copied."""
        return [
            array if reuse else array.copy() for array, reuse in zip(self.arrays, self.in_place, strict=True)
        ]


class Scheme(ABC):
    """How a group of gradients is reduced; one that changes gradients before or after passes them to another.

    The form is that of PyTorch's communication hooks (https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html).
    `repr(scheme)` is compared over the ranks, so it should contain the scheme's parameters, as a dataclass does.

    Attributes:
        is_exact: Whether the result is that of `Group.op` up to rounding, for gradients from which the change of
            `State.errors` has been subtracted. Only then can the verification of a step compare the applied
            gradients with an independent result.
    """

    is_exact = False

    def check(self, shapes: Sequence[tuple[int | None, ...]]) -> None:  # noqa: B027 - most schemes take all
        """Raise ValueError if the scheme is of no use for gradients of these shapes."""

    @abstractmethod
    def reduce(self, group: Group, engine: Engine, state: State) -> Group:
        """Reduce gradients over the ranks.

        Args:
            group: The gradients of this rank.
            engine: Runs collective operations on NumPy arrays; all ranks call the same ones in the same order.
            state: Kept between the steps; empty at first.

        Returns:
            The group with the reduced arrays, of the same shapes and dtypes, the same on all ranks.
        """


@dataclass(frozen=True)
class Plain(Scheme):
    """One allreduce of the gradients as they are."""

    is_exact = True

    def reduce(self, group: Group, engine: Engine, state: State) -> Group:
        """Reduce gradients by `Engine.grouped_allreduce`."""
        results = engine.grouped_allreduce(group.arrays, group.op, group.call, group.in_place)
        return group.with_arrays(results, [None] * len(results))


class Compressor:
    """Horovod's form of a compression: two static methods on tensors, applied before and after the reduction.

    The API is Horovod's (https://horovod.readthedocs.io/en/stable/api.html). Any class with these methods will do.
    """

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Compress a tensor before it is sent.

        Args:
            tensor: A gradient.

        Returns:
            The tensor to send, of the same shape on all ranks, and the context for `decompress`.
        """
        raise NotImplementedError

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Restore the gradient from the combined tensor."""
        raise NotImplementedError


def is_compressor(value: Any) -> bool:
    """Return whether a value has the two methods of a `Compressor`."""
    return all(hasattr(value, method) for method in ("compress", "decompress"))


class NoneCompressor(Compressor):
    """Sends gradients unchanged."""

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Return the tensor itself."""
        return tensor, None

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Return the tensor itself."""
        return tensor
