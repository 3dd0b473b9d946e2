"""Define how gradients are reduced over the ranks, and how they are compressed before they are sent."""

from abc import ABC, abstractmethod
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hvdtrain.collectives.engine import Call, Engine, Op

# What a scheme remembers between the steps of one optimizer, such as the error of the last step by `Group.keys`.
State = MutableMapping[Any, Any]


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
    """

    arrays: Sequence[np.ndarray]
    op: Op
    keys: Sequence[str] = ()
    in_place: Sequence[bool] = ()
    call: Call | None = None

    def with_arrays(self, arrays: Sequence[np.ndarray]) -> "Group":
        """Return the group with new arrays, which may be overwritten."""
        return replace(self, arrays=arrays, in_place=[True] * len(arrays))


class Scheme(ABC):
    """How a group of gradients is reduced; one that changes gradients before or after passes them to another.

    The form is that of PyTorch's communication hooks (https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html).
    `repr(scheme)` is compared over the ranks, so it should contain the scheme's parameters, as a dataclass does.

    Attributes:
        is_exact: Whether the result is that of `Group.op` up to rounding. Only then can the verification of a step
            compare the applied gradients with an independent result.
    """

    is_exact = False

    @abstractmethod
    def reduce(self, group: Group, engine: Engine, state: State) -> Group:
        """Reduce gradients over the ranks.

        Args:
            group: The gradients of this rank.
            engine: Runs collective operations on NumPy arrays; all ranks call the same ones in the same order.
            state: Kept between the steps, on each rank its own; empty at first.

        Returns:
            The group with the reduced arrays, of the same shapes and dtypes, the same on all ranks.
        """


@dataclass(frozen=True)
class Plain(Scheme):
    """One allreduce of the gradients as they are."""

    is_exact = True

    def reduce(self, group: Group, engine: Engine, state: State) -> Group:
        """Reduce gradients by `Engine.grouped_allreduce`."""
        return group.with_arrays(engine.grouped_allreduce(group.arrays, group.op, group.call, group.in_place))


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
