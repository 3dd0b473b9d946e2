"""Exchange the gradients of one step over the ranks, as NumPy arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hvdtrain.collectives.engine import Call, Engine, Op
from hvdtrain.gradients.verification import Verification


@dataclass(frozen=True)
class Exchange:
    """The operations on one step's gradients as NumPy arrays.

    Args:
        engine: Moves the arrays.
        op: SUM, AVERAGE or ADASUM.
        call: The call that the ranks compare before anything is sent; its kind also names the operations.
        verification: Counts the steps and records gradients of steps that are verified; None for no verification.
        factor: The gradients have been multiplied by this.
    """

    engine: Engine
    op: Op
    call: Call
    verification: Verification | None = None
    factor: float = 1.0

    def begin(self) -> bool:
        """Count a step; return whether it is verified."""
        return self.verification is not None and self.verification.begin()

    def record(self, places: Sequence[int], arrays: Sequence[np.ndarray]) -> None:
        """Record gradients before they are reduced in place.

        Args:
            places: Their indices among the dense gradients.
            arrays: The gradients.
        """
        if self.verification is not None:
            for place, array in zip(places, arrays, strict=True):
                self.verification.record(place, array, self.factor)

    def reduce(
        self, arrays: Sequence[np.ndarray], call: Call | None, in_place: Sequence[bool]
    ) -> list[np.ndarray]:
        """Combine dense gradients; see `Engine.grouped_allreduce`."""
        return self.engine.grouped_allreduce(arrays, self.op, call, in_place)

    def join(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Join the rows of sparse gradients: values and indices in turn."""
        return [self.engine.allgather(array) for array in arrays]
