"""Implement the results of `hvd.shard` for arrays, PyDatasets and generators."""

import itertools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain.data import structures
from hvdtrain.data.sample_plan import Part, Position, deal, part_of
from hvdtrain.data.sources import ArraySource, BatchSource


class ShardedDataset(keras.utils.PyDataset):
    """This rank's part of each global batch, for `model.fit` or a loop of your own.

    Each time it has been read to its end a new epoch begins, with a new order if it is shuffled. Looking
    into it (`data[0]`, `next(iter(data))`) changes nothing.

    Args:
        source: The source of the samples.
        position: The current epoch and step.
        window: Steps that are read at a time; by default the rest of the epoch.
        dealt: Whether batches include the numbers of samples, as `fit` and `evaluate` read them.
    """

    def __init__(
        self,
        source: ArraySource | BatchSource,
        position: Position,
        window: int | None = None,
        dealt: bool = False,
    ) -> None:
        own = getattr(source, "dataset", None)
        names = ("workers", "use_multiprocessing", "max_queue_size")
        super().__init__(**({name: getattr(own, name) for name in names} if own is not None else {}))
        self.source = source
        self.position = position
        self._window = window
        self._dealt = dealt

    @property
    def num_batches(self) -> int:
        """Steps left in this epoch: the same on all ranks."""
        return self._window or self.steps - self.position.step

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return self.source.steps

    @property
    def partial(self) -> bool:
        """Whether some global batch is not full."""
        return self.source.partial

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Any:
        """Return this rank's part of a step, counted from the step at which the epoch was resumed."""
        if not 0 <= index < self.num_batches:
            raise IndexError(f"step {index} of an epoch with {self.num_batches} steps")
        part = self.source.part(*self.position.at(index, self.steps))
        return part.dealt() if self._dealt else part.weighted(self.source.remainder == "keep")

    def __iter__(self) -> Iterator[Any]:
        self.begin()
        for index in range(self.num_batches):
            self.position.done = index + 1
            yield self[index]
        self.end()

    def begin(self) -> None:
        """Begin an epoch, or begin it again after a batch was read as a test."""
        self.position.done = 0
        self.source.begin(self.position.epoch)

    def end(self) -> None:
        """End the epoch, so that the next has another order; or the window, which may span several epochs."""
        before = self.position.epoch
        self.position.advance(self.num_batches, self.steps)
        for past in range(before, self.position.epoch):
            self.source.end(past)

    def state(self) -> dict[str, int]:
        """Return the position {"epoch": …, "step": …}, from which any number of ranks can continue.

        Returns:
            Keyword arguments for `hvd.shard`: the epoch, and the number of its steps that are done. Inside
            `fit` and inside a loop over this object these are the steps whose batches were trained on.
        """
        return self.position.state(self.steps)

    def go_on(self, epoch: int, step: int, read: int) -> None:
        """Move to a position without reading the batches before it; a PyDataset is notified of the epochs."""
        for past in range(self.position.epoch, epoch):
            self.source.begin(past)
            self.source.end(past)
        self.position.move(epoch, step)

    def reading(
        self, position: Position, window: int | None, dealt: bool, class_weight: dict[int, float] | None
    ) -> "ShardedDataset":
        """Return the same data from a position on, in the form that the Keras adapter reads."""
        source = self.source if class_weight is None else self.source.weighted(class_weight)
        return ShardedDataset(source, position, window, dealt)


class ShardedGenerator:
    """This rank's part of each batch of a generator, for `fit(…, steps_per_epoch=…)` or a loop of your own.

    Each rank runs the whole generator and takes its rows; with `keep` also of a batch that is not full. A generator
    can be read once and its length and order are unknown, so neither can be checked.
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
        class_weight: dict[int, float] | None,
    ) -> None:
        self._batches = batches
        self._batch_size, self._rank, self._size = batch_size, rank, size
        self._keep = keep
        self._class_weight = class_weight
        self.position = Position()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._part().weighted(self._keep)

    def begin(self) -> None:
        """Do nothing: a generator has no epochs of its own."""

    def end(self) -> None:
        """Do nothing: a generator has no epochs of its own."""

    def go_on(self, epoch: int, step: int, read: int) -> None:
        """Skip the batches that were read before; a generator cannot be moved to a position otherwise."""
        for _ in itertools.islice(self._parts(), read):
            pass

    def reading(
        self, position: Position, window: int | None, dealt: bool, class_weight: dict[int, float] | None
    ) -> tf.data.Dataset:
        """Return the remaining batches, in the form that the Keras adapter reads."""
        if class_weight is not None:
            self._class_weight = class_weight
        batches = (part.dealt() if dealt else part.weighted(self._keep) for part in self._parts())
        first = next(batches, None)
        if first is None:
            raise ValueError("hvd.shard: the generator is used up; make a new one for another fit.")
        rest = itertools.chain([first], batches)
        return tf.data.Dataset.from_generator(
            lambda: rest, output_signature=tf.nest.map_structure(_spec, first)
        )

    def _parts(self) -> Iterator[Part]:
        return iter(self._part, None)  # the end of the generator ends it

    def _part(self) -> Part:
        while True:
            batch = structures.all_arrays(structures.unpacked(next(self._batches)))
            count = structures.length(batch)
            if count > self._batch_size:
                raise ValueError(
                    f"hvd.shard: the generator yielded a batch of {count}, more than batch_size="
                    f"{self._batch_size}. Its batches are the global ones; give their size as batch_size."
                )
            if self._keep or count == self._batch_size:
                return part_of(batch, deal(count, self._rank, self._size), self._class_weight)


def _spec(leaf: Any) -> tf.TensorSpec:
    array = np.asarray(leaf)
    dtype = tf.string if array.dtype == object else tf.as_dtype(array.dtype)
    return tf.TensorSpec((None, *array.shape[1:]), dtype)
