"""Exchange the gradients of one step over the ranks, as NumPy arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hvdtrain.collectives.engine import Call, Engine, Op
from hvdtrain.gradients.schemes import Group, Plain, Scheme, State
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
        scheme: How dense gradients are reduced.
        keys: Names of the dense gradients, for the scheme.
        state: What the scheme remembers between steps.
    """

    engine: Engine
    op: Op
    call: Call
    verification: Verification | None = None
    factor: float = 1.0
    scheme: Scheme = field(default_factory=Plain)
    keys: Sequence[str] = ()
    state: State = field(default_factory=State)

    @property
    def takes_tensors(self) -> bool:
        """Whether an engine's own graph operations on tensors give the same result."""
        return isinstance(self.scheme, Plain) and self.op is not Op.ADASUM

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
        self,
        places: Sequence[int],
        arrays: Sequence[np.ndarray],
        call: Call | None,
        in_place: Sequence[bool],
    ) -> list[np.ndarray]:
        """Reduce a group of dense gradients by the scheme.

        Args:
            places: Their indices among the dense gradients.
            arrays: The gradients.
            call: The call that the ranks compare first, or None; see `Group`.
            in_place: For each array whether the result takes its place.

        Returns:
            The reduced gradients, in the same order.
        """
        if not arrays:
            if call:
                self.engine.agree(call)
            return []
        keys = [self.keys[place] for place in places] if self.keys else []
        out = [array if reuse else None for array, reuse in zip(arrays, in_place, strict=True)]
        group = Group(arrays, self.op, keys, in_place, call, out)
        self._record_errors(places, keys, before=True)
        results = list(self.scheme.reduce(group, self.engine, self.state).arrays)
        self._record_errors(places, keys, before=False)
        for index, reuse in enumerate(in_place):
            if reuse and results[index] is not arrays[index]:
                arrays[index][...] = results[index]
                results[index] = arrays[index]
        return results

    def _record_errors(self, places: Sequence[int], keys: Sequence[str], before: bool) -> None:
        """Record what the scheme has left out so far, before or after it reduces gradients."""
        if self.verification is not None and self.state.errors:
            for place, key in zip(places, keys, strict=True):
                if key in self.state.errors:
                    factor = self.factor if before else -self.factor
                    self.verification.record(place, self.state.errors[key], factor)

    def join(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Join the rows of sparse gradients: values and indices in turn."""
        return [self.engine.allgather(array) for array in arrays]
