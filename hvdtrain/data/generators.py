"""Divide the batches of a Python generator: each rank runs the whole generator and takes its rows."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.data import structures
from hvdtrain.data.local_batch import Part, part_of
from hvdtrain.data.position import Position
from hvdtrain.data.sample_plan import deal


class ShardedGenerator:
    """This rank's part of each batch of a generator, for `fit(…, steps_per_epoch=…)` or a loop of your own.

    A generator can be read once and its length and order are unknown, so neither can be checked.

    Args:
        batches: The user's generator; it yields global batches.
        batch_size: The global batch.
        rank: This rank.
        size: Number of ranks.
        keep: Whether a batch that is not full is trained on; else it is left out.
        class_weight: Weights by class, or None.
    """

    partial = True
    num_batches = steps = None

    def __init__(
        self,
        batches: Iterator[Any],
        batch_size: int,
        rank: int,
        size: int,
        keep: bool,
        class_weight: dict[int, float] | None = None,
    ) -> None:
        self._batches = batches
        self._options = (batch_size, rank, size, keep)
        self._class_weight = class_weight
        self.position = Position()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._next().weighted(self._options[-1])

    def begin(self) -> None:
        """Do nothing: a generator has no epochs of its own."""

    def end(self) -> None:
        """Do nothing: a generator has no epochs of its own."""

    def go_on(self, epoch: int, step: int, read: int) -> None:
        """Skip the batches that were read before; a generator cannot be moved to a position otherwise."""
        for _ in range(read):
            next(self._parts(), None)

    def reading(
        self, position: Position, window: int | None, dealt: bool, class_weight: dict[int, float] | None
    ) -> tf.data.Dataset:
        """Return the remaining batches, in the form that the Keras adapter reads."""
        if class_weight is not None:
            self._class_weight = class_weight
        first = next(self._parts(), None)
        if first is None:
            raise ValueError("hvd.shard: the generator is used up; make a new one for another fit.")

        def batch(part: Part) -> Any:
            return part.dealt() if dealt else part.weighted(self._options[-1])

        rest = iter([batch(first)])
        spec = tf.nest.map_structure(_spec, batch(first))

        def batches() -> Iterator[Any]:
            yield from rest
            yield from (batch(part) for part in self._parts())

        return tf.data.Dataset.from_generator(batches, output_signature=spec)

    def _parts(self) -> Iterator[Part]:
        while True:
            try:
                yield self._next()
            except StopIteration:
                return

    def _next(self) -> Part:
        batch_size, rank, size, keep = self._options
        while True:
            batch = structures.all_arrays(structures.unpacked(next(self._batches)))
            count = structures.length(batch)
            if count > batch_size:
                raise ValueError(
                    f"hvd.shard: the generator yielded a batch of {count}, more than batch_size={batch_size}. "
                    "Its batches are the global ones; give their size as batch_size."
                )
            if keep or count == batch_size:
                return part_of(batch, deal(count, rank, size), self._class_weight)


def _spec(leaf: Any) -> tf.TensorSpec:
    array = np.asarray(leaf)
    return tf.TensorSpec(
        (None, *array.shape[1:]), tf.as_dtype(array.dtype) if array.dtype != object else tf.string
    )
