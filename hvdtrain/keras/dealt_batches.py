"""Distribute whole batches to the ranks in turn, so that together they read the batches of one process.

Each kind of data has the same methods: `enough(size)` returns whether there is at least one batch for every rank,
`facts()` what must be the same on all ranks, `dealt(rank, size)` a rank's batches, and `as_x()` what
`model.evaluate` takes as x.
"""

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


def dealt_data(
    parts: tuple[Any, Any, Any], batch_size: int | None, steps: int | None, size: int
) -> "DealtData":
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
        return _pipeline(x, batch_size, steps)
    if isinstance(x, keras.utils.PyDataset):
        counts = [count for count in (x.num_batches, steps) if count is not None]
        if not counts:
            raise ValueError(
                "This PyDataset is endless: it has no length. Give steps=…, the number of batches to take."
            )
        return _Batches(x, range(min(counts)))
    if hasattr(x, "__next__"):
        batches = itertools.islice(x, steps)
        return _Stream(batches, tuple(itertools.islice(batches, size)))
    return _arrays(parts, batch_size or BATCH, steps)


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

    def as_x(self) -> Any:
        """Return a data set of batches.

        For arrays whose length is a multiple of the batch size Keras weights the losses of several outputs by
        samples, for others by batches. For a data set with an unknown first dimension it does the same on all
        ranks.
        """
        given = structures.all_arrays(self.parts)
        parts = [structures.mapped(lambda leaf, _: structures.as_keras(leaf), part) for part in given]
        while parts[-1] is None:
            parts.pop()
        return tf.data.Dataset.from_tensor_slices(tuple(parts)).batch(self.batch_size)


def _arrays(parts: tuple[Any, Any, Any], batch_size: int, steps: int | None) -> Arrays:
    x, y, weight = (
        None if part is None else keras.tree.map_structure(np.asarray, _numbers(part)) for part in parts
    )
    length = structures.length(structures.all_arrays((x, y, weight)))
    if steps is not None:
        length = min(length, steps * batch_size)
    if not length:
        raise ValueError("The data holds no samples. Received: arrays of length 0.")
    return Arrays((x, y, weight), length, batch_size)


def _numbers(value: Any) -> Any:
    """Return a list of plain numbers as an array, so that it is one leaf of the nest."""
    is_list = isinstance(value, list | tuple) and bool(value)
    return np.asarray(value) if is_list and isinstance(value[0], int | float | str | bytes) else value


@dataclass(frozen=True)
class _Pipeline:
    """A `tf.data.Dataset` of batches; each rank reads all of them and keeps its own."""

    dataset: tf.data.Dataset

    def enough(self, size: int) -> bool:
        known = int(self.dataset.cardinality())
        if known >= 0:
            return known >= size
        return next(iter(self.dataset.skip(size - 1).take(1)), None) is not None

    def facts(self) -> Facts:
        if dataset_graph.shuffles_without_seed(self.dataset) or dataset_graph.in_any_order(self.dataset):
            raise ValueError(
                "Each rank would read this data set in its own order, because it is shuffled without a seed, "
                "or made with deterministic=False. Give the data set as it is before shuffling."
            )
        seeds = ("the seed of its shuffling", dataset_graph.seeds(self.dataset))
        return [*datasets.tf_facts(self.dataset), seeds]

    def dealt(self, rank: int, size: int) -> "_Pipeline":
        return _Pipeline(self.dataset.shard(size, rank))

    def as_x(self) -> Any:
        return self.dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)


def _pipeline(dataset: tf.data.Dataset, batch_size: int | None, steps: int | None) -> _Pipeline:
    if batch_size is not None and not dataset_graph.is_batched(dataset):
        dataset = dataset.batch(batch_size)
    if steps is not None:
        dataset = dataset.take(steps)
    datasets.own_batch(dataset)  # raises if it is endless or empty
    return _Pipeline(dataset)


class _Batches(keras.utils.PyDataset):
    """Some batches of a `keras.utils.PyDataset`, by their indices; no others are made."""

    def __init__(self, dataset: keras.utils.PyDataset, places: range) -> None:
        names = ("workers", "use_multiprocessing", "max_queue_size")
        super().__init__(**{name: getattr(dataset, name) for name in names})
        self._dataset = dataset
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[self._places[index]]

    def enough(self, size: int) -> bool:
        return len(self) >= size

    def facts(self) -> Facts:
        return [("the number of batches", str(len(self)))]

    def dealt(self, rank: int, size: int) -> "_Batches":
        return _Batches(self._dataset, self._places[rank::size])

    def as_x(self) -> Any:
        return self


@dataclass(frozen=True)
class _Stream:
    """Batches from a generator, of which the first, one for each rank, are read already.

    Each rank makes all of them and keeps its own.
    """

    batches: Iterator[Any]
    first: tuple[Any, ...]

    def enough(self, size: int) -> bool:
        return len(self.first) >= size

    def facts(self) -> Facts:
        return [("the number of its first batches", str(len(self.first)))]

    def dealt(self, rank: int, size: int) -> "_Stream":
        return _Stream(itertools.islice(iter(self), rank, None, size), ())

    def as_x(self) -> Any:
        return (batch for batch in self)  # Keras recognises generators only

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain(self.first, self.batches)


DealtData = Arrays | _Pipeline | _Batches | _Stream
