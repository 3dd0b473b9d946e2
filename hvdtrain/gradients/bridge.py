"""Define the operations on a framework's tensors that the exchange of gradients needs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdtrain.collectives.engine import Engine
from hvdtrain.gradients.exchange import Exchange

# A tensor, a sparse gradient and a variable of whichever framework is in use; they have no common type.
Tensor = Any
Gradient = Any
Variable = Any


@dataclass(frozen=True)
class Exchanged:
    """The gradients of one step after the exchange.

    Args:
        dense: The combined tensors, in the order in which they were given.
        rows: The joined tensors, likewise.
        due: Bool tensor: whether this step is verified.
        recorded: Whether the exchange has recorded the dense gradients for the verification.
    """

    dense: list[Tensor]
    rows: list[Tensor]
    due: Tensor
    recorded: bool


class Bridge(ABC):
    """The tensors of one framework.

    A gradient is a dense tensor, or sparse: rows of values and the indices of these rows in the variable.
    All methods work inside a graph as well as eagerly, where the framework has both.
    """

    @abstractmethod
    def is_sparse(self, gradient: Gradient) -> bool:
        """Return whether a gradient is sparse."""

    @abstractmethod
    def parts(self, gradient: Gradient) -> list[Tensor]:
        """Return the tensors of a gradient: its values, and the indices of a sparse one."""

    @abstractmethod
    def with_rows(self, gradient: Gradient, values: Tensor, indices: Tensor) -> Gradient:
        """Return a sparse gradient of the same variable with other rows."""

    @abstractmethod
    def to_dense(self, gradient: Gradient) -> Tensor:
        """Return a gradient as a dense tensor."""

    @abstractmethod
    def scaled(self, gradient: Gradient, factor: float) -> Gradient:
        """Return a gradient multiplied by a factor, in its own dtype."""

    @abstractmethod
    def dtype_name(self, gradient: Gradient) -> str:
        """Return the name of a gradient's dtype, as NumPy writes it."""

    @abstractmethod
    def exchange(
        self,
        exchange: Exchange,
        dense: Sequence[Tensor],
        rows: Sequence[Tensor],
        groups: Sequence[Sequence[int]] = (),
        devices: tuple[str, str] = ("", ""),
    ) -> Exchanged:
        """Combine the gradients of one step over the ranks.

        Args:
            exchange: The operations on them as NumPy arrays.
            dense: Tensors to combine, in the order of the variables.
            rows: Tensors to join along their first dimension: values and indices of each sparse gradient in turn.
            groups: Indices of the tensors of `dense` that are sent as one; the engine decides about the others.
            devices: Devices for the engine's own graph operations: those that reduce, and those that gather.
        """

    @abstractmethod
    def check(
        self,
        engine: Engine,
        due: Tensor,
        compare: Callable[..., list[np.ndarray]],
        variables: Sequence[Variable],
        gradients: Sequence[Gradient],
    ) -> Tensor:
        """Call `compare` on the host if a step is due to be verified.

        Args:
            engine: Stores an error that `compare` raises.
            due: Bool tensor.
            compare: Takes the arrays of the variables, then all parts of the gradients.
            variables: The variables.
            gradients: The gradients.

        Returns:
            A tensor that exists once the check has passed.
        """

    @abstractmethod
    def after(self, dependency: Tensor, gradients: Sequence[Gradient]) -> list[Gradient]:
        """Return the gradients such that they are used only after a tensor has been computed."""

    @abstractmethod
    def readable(self, variables: Iterable[Variable]) -> list[Variable]:
        """Return those variables whose values can be read at any later time."""
