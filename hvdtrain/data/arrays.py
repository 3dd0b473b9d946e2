"""Shuffle samples in NumPy arrays over the whole data set and divide them among the ranks."""

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np

from hvdtrain.data import structures
from hvdtrain.data.local_batch import Part, class_weights, refuse_both
from hvdtrain.data.sample_plan import Plan


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Arrays that every rank holds completely, and of which it reads its part.

    Args:
        x: Inputs: an array, or a dict or tuple of arrays.
        y: Targets, likewise, or None.
        sample_weight: Weights, likewise, or None.
        plan: Which rank reads which samples.
    """

    x: Any
    y: Any
    sample_weight: Any
    plan: Plan

    @property
    def steps(self) -> int:
        """Number of global batches an epoch."""
        return self.plan.steps

    @property
    def partial(self) -> bool:
        """Whether some global batch is not full."""
        return self.remainder == "keep" and self.plan.partial and self.plan.size > 1

    @property
    def remainder(self) -> str:
        """Treatment of a last batch that is not full: "keep" or "drop"."""
        return self.plan.remainder

    def part(self, epoch: int, step: int) -> Part:
        """Return this rank's rows of a global batch."""
        indices, rows = self.plan.part(self._order(epoch), step)
        x, y, weight = (structures.rows(value, indices) for value in (self.x, self.y, self.sample_weight))
        return Part(x, y, weight, rows)

    def weighted(self, class_weight: dict[int, float]) -> "ArraySource":
        """Return a source of the same samples with weights by class."""
        refuse_both(self.sample_weight)
        return dataclasses.replace(self, sample_weight=class_weights(self.y, class_weight))

    def facts(self) -> list[tuple[str, str]]:
        """Return the facts that must be the same on all ranks, as (name, value)."""
        described = structures.all_described((self.x, self.y, self.sample_weight))
        return [("the number of samples", str(self.plan.length)), *described]

    def begin(self, epoch: int) -> None:
        """Do nothing: arrays need no preparation before an epoch."""

    def end(self, epoch: int) -> None:
        """Do nothing: arrays do not change after an epoch."""

    @cached_property
    def _orders(self) -> dict[int, np.ndarray]:
        return {}

    def _order(self, epoch: int) -> np.ndarray:
        """Return the order of an epoch, from a cache that holds only the epoch being read."""
        order = self._orders.get(epoch)
        if order is None:
            order = self.plan.order(epoch)
            self._orders.clear()
            self._orders[epoch] = order
        return order


def array_source(data: Any, plan_of: Any) -> ArraySource:
    """Make a source of the data that a user has passed.

    Args:
        data: x, (x, y) or (x, y, sample_weight).
        plan_of: Function that makes the plan from the number of samples.
    """
    x, y, given = structures.all_arrays(structures.unpacked(data))
    if given is not None and y is None:
        raise ValueError("hvd.shard: a sample_weight without targets y has no use in Keras.")
    return ArraySource(x, y, given, plan_of(structures.length((x, y, given))))
