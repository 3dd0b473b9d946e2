"""Distribute whole batches to the ranks in turn, so that together they read the batches of one process."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain.data import dataset_graph, datasets, structures

BATCH = 32  # the default of Keras

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Arrays:
    """Samples in arrays.

    Args:
        parts: x, y and sample_weight, each a nest of arrays or None.
        length: Number of samples.
        batch_size: Samples of a batch.
    """

    parts: tuple[Any, Any, Any]
    length: int
    batch_size: int

    @classmethod
    def of(cls, parts: tuple[Any, Any, Any], batch_size: int | None, steps: int | None) -> "Arrays":
        """Convert nests to arrays, of at most `steps` batches."""
        x, y, weight = (
            None if part is None else keras.tree.map_structure(np.asarray, _numbers(part)) for part in parts
        )
        named = (
            structures.arrays(x, "x"),
            structures.arrays(y, "y"),
            structures.arrays(weight, "sample_weight"),
        )
        length, batch_size = structures.length(named), batch_size or BATCH
        length = length if steps is None else min(length, steps * batch_size)
        return cls((x, y, weight), length, batch_size)

    def enough(self, size: int) -> bool:
        """Return whether there is at least one batch for every rank."""
        return self.length >= size

    def facts(self) -> Facts:
        """Return the facts that must be the same on all ranks."""
        return [("the number of samples", str(self.length)), *structures.all_described(self.parts)]

    def dealt(self, rank: int, size: int) -> "Arrays":
        """Return a rank's batches; they are smaller if there would be fewer batches than ranks."""
        batch_size = max(1, min(self.batch_size, self.length // size))
        places = np.arange(self.length)
        mine = places[places // batch_size % size == rank]
        x, y, weight = (
            None if part is None else keras.tree.map_structure(lambda leaf: leaf[mine], part)
            for part in self.parts
        )
        return Arrays((x, y, weight), len(mine), batch_size)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `model.evaluate`.

        For arrays whose length is a multiple of the batch size Keras weights the losses of several outputs by
        samples, for others by batches. For a data set with an unknown first dimension it does the same on all
        ranks.
        """
        given = structures.all_arrays(self.parts)
        parts = [structures.mapped(lambda leaf, _: structures.as_keras(leaf), part) for part in given]
        while parts[-1] is None:
            parts.pop()
        return {"x": tf.data.Dataset.from_tensor_slices(tuple(parts)).batch(self.batch_size)}


@dataclass(frozen=True)
class Pipeline:
    """A `tf.data.Dataset` of batches."""

    dataset: tf.data.Dataset

    @classmethod
    def of(cls, dataset: tf.data.Dataset, batch_size: int | None, steps: int | None) -> "Pipeline":
        """Take the first `steps` batches; samples are batched first.

        Raises:
            ValueError: If the data set is endless or empty.
        """
        if batch_size is not None and not dataset_graph.is_batched(dataset):
            dataset = dataset.batch(batch_size)
        if steps is not None:
            dataset = dataset.take(steps)
        datasets.own_batch(dataset)  # raises if it is endless or empty
        return cls(dataset)

    def enough(self, size: int) -> bool:
        """Return whether there is at least one batch for every rank."""
        known = int(self.dataset.cardinality())
        if known >= 0:
            return known >= size
        return next(iter(self.dataset.skip(size - 1).take(1)), None) is not None

    def facts(self) -> Facts:
        """Return the facts that must be the same on all ranks.

        Raises:
            ValueError: If each rank would read the batches in a different order.
        """
        if dataset_graph.shuffles_without_seed(self.dataset) or dataset_graph.in_any_order(self.dataset):
            raise ValueError(
                "Each rank would read this data set in its own order, because it is shuffled without a seed, "
                "or made with deterministic=False. Give the data set as it is before shuffling."
            )
        return [
            *datasets.tf_facts(self.dataset),
            ("the seed of its shuffling", dataset_graph.seeds(self.dataset)),
        ]

    def dealt(self, rank: int, size: int) -> "Pipeline":
        """Return a rank's batches; the rank reads all of them and keeps its own."""
        return Pipeline(self.dataset.shard(size, rank))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `model.evaluate`."""
        return {"x": self.dataset}

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)


class Batches(keras.utils.PyDataset):
    """Some batches of a `keras.utils.PyDataset`.

    Args:
        dataset: The whole data set.
        places: Indices of its batches.
    """

    def __init__(self, dataset: keras.utils.PyDataset, places: range) -> None:
        names = ("workers", "use_multiprocessing", "max_queue_size")
        super().__init__(**{name: getattr(dataset, name) for name in names})
        self._dataset = dataset
        self._places = places

    @classmethod
    def of(cls, dataset: keras.utils.PyDataset, steps: int | None) -> "Batches":
        """Take the first `steps` batches."""
        counts = [count for count in (dataset.num_batches, steps) if count is not None]
        if not counts:
            raise ValueError(
                "This PyDataset is endless: it has no length. Give steps=…, the number of batches to take."
            )
        return cls(dataset, range(min(counts)))

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return len(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self._places):  # ends a loop over this object
            raise IndexError(f"batch {index} of {len(self._places)}")
        return self._dataset[self._places[index]]

    def enough(self, size: int) -> bool:
        """Return whether there is at least one batch for every rank."""
        return len(self) >= size

    def facts(self) -> Facts:
        """Return the facts that must be the same on all ranks."""
        return [("the number of batches", str(len(self)))]

    def dealt(self, rank: int, size: int) -> "Batches":
        """Return a rank's batches; no others are made."""
        return Batches(self._dataset, self._places[rank::size])

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `model.evaluate`."""
        return {"x": self}


@dataclass(frozen=True)
class Stream:
    """Batches from a generator."""

    batches: Iterator[Any]
    first: tuple[Any, ...]

    @classmethod
    def of(cls, batches: Iterator[Any], steps: int | None, size: int) -> "Stream":
        """Take at most `steps` batches, of which one for each rank is read now."""
        batches = itertools.islice(batches, steps)
        return cls(batches, tuple(itertools.islice(batches, size)))

    def enough(self, size: int) -> bool:
        """Return whether there is at least one batch for every rank."""
        return len(self.first) >= size

    def facts(self) -> Facts:
        """Return the facts that must be the same on all ranks."""
        return [("the number of its first batches", str(len(self.first)))]

    def dealt(self, rank: int, size: int) -> "Stream":
        """Return a rank's batches; the rank makes all of them and keeps its own."""
        return Stream(itertools.islice(iter(self), rank, None, size), ())

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `model.evaluate`."""
        return {"x": (batch for batch in self)}

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain(self.first, self.batches)


DealtData = Arrays | Pipeline | Batches | Stream


def dealt_data(
    parts: tuple[Any, Any, Any], batch_size: int | None, steps: int | None, size: int
) -> DealtData:
    """Return the batches of the data that a user has passed.

    Args:
        parts: x, y and sample_weight; only x if it contains the targets.
        batch_size: Samples per batch, if the data is not batched already.
        steps: Number of batches to take; None for all.
        size: Number of ranks.

    Raises:
        ValueError: If the data is empty or endless, or arrays differ in length.
        TypeError: If the data has an unsupported type.
    """
    x = parts[0]
    if isinstance(x, tf.data.Dataset):
        return Pipeline.of(x, batch_size, steps)
    if isinstance(x, keras.utils.PyDataset):
        return Batches.of(x, steps)
    if hasattr(x, "__next__"):
        return Stream.of(x, steps, size)
    found = Arrays.of(parts, batch_size, steps)
    if not found.length:
        raise ValueError("The data holds no samples. Received: arrays of length 0.")
    return found


def _numbers(value: Any) -> Any:
    """Return a list of plain numbers as an array, so that it is one leaf of the nest."""
    is_list = isinstance(value, list | tuple) and bool(value)
    return np.asarray(value) if is_list and isinstance(value[0], int | float | str | bytes) else value
