"""Implement `hvd.shard` for a `tf.data.Dataset`; the result is a `tf.data.Dataset` too."""

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.collectives.engine import Call
from hvdtrain.data import dataset_graph, structures
from hvdtrain.data.pipelines import ByFiles, ByRows
from hvdtrain.data.sample_plan import Position


class ShardedTFDataset(tf.data.Dataset):
    """This rank's part of each global batch of a `tf.data.Dataset`, itself a `tf.data.Dataset`.

    Each time it has been read to its end a new epoch begins, with a new order if it is shuffled. Looking
    into it changes nothing. A data set made from it (`.map`, `.prefetch`, …) counts its own epochs.
    """

    def __init__(self, pipeline: ByRows | ByFiles, seed: int, position: Position) -> None:
        self.pipeline = pipeline
        self.position = position
        self._seed = seed
        self._derived = self._built(position, dealt=False, counts_readings=True)
        super().__init__(tf.data.experimental.to_variant(self._derived))

    @property
    def element_spec(self) -> Any:
        """Structure of a batch."""
        return self._derived.element_spec

    @property
    def num_batches(self) -> int | None:
        """Steps left in this epoch, the same on all ranks; None if unknown before the data has been read."""
        return None if self.steps is None else self.steps - self.position.step

    @property
    def steps(self) -> int | None:
        """Steps of a whole epoch; None if unknown before the data has been read."""
        return self.pipeline.steps

    @property
    def partial(self) -> bool:
        """Whether some global batch may not be full."""
        return self.pipeline.partial

    def __iter__(self) -> Iterator[Any]:
        return self._read() if tf.executing_eagerly() else super().__iter__()

    def begin(self) -> None:
        """Begin an epoch, or begin it again after a batch was read as a test.

        Raises:
            MismatchError: On every rank, if the ranks would read it in different orders from now on.
        """
        if self.pipeline.division.reshuffled and isinstance(self.pipeline, ByRows):
            runtime.engine().agree(
                Call(
                    f"reading number {self.position.readings + 1} of data that shuffle themselves (a look inside "
                    "on one rank changes their order there; leave that to hvd.shard(…, shuffle=True))"
                )
            )
        self.position.done = 0

    def end(self) -> None:
        """End the epoch; the next one begins at step 0 and has a different order."""
        self.position.move(self.position.epoch + 1, 0)

    def state(self) -> dict[str, int]:
        """Return the position of the training; see `ShardedDataset.state`."""
        return self.position.state(self.steps or 2**62)

    def go_on(self, epoch: int, step: int, read: int) -> None:
        """Move to a position; see `ShardedDataset.go_on`."""
        if self.pipeline.division.reshuffled and runtime.engine().rank == 0:
            warnings.warn(
                "hvd.shard: this data set shuffles itself, in an order that depends on how often it has been read, "
                "so the resumed run reads it in another order than the run before. Leave its .shuffle() out and "
                "type hvd.shard(…, shuffle=True).",
                stacklevel=2,
            )
        self.position.move(epoch, step)

    def reading(
        self, position: Position, window: int | None, dealt: bool, class_weight: dict[int, float] | None
    ) -> tf.data.Dataset:
        """Return the same data from a position on, in the form that the Keras adapter reads."""
        if class_weight is None:
            return self._built(position, dealt, window)
        division = dataclasses.replace(self.pipeline.division, class_weight=class_weight)
        pipeline = dataclasses.replace(self.pipeline, division=division)
        return ShardedTFDataset(pipeline, self._seed, self.position).reading(position, window, dealt, None)

    def _read(self) -> Iterator[Any]:
        self.begin()
        for index, batch in enumerate(self._built(self.position, dealt=False)):
            self.position.done = index + 1
            yield batch
        self.end()

    def _built(
        self, position: Position, dealt: bool, window: int | None = None, counts_readings: bool = False
    ) -> tf.data.Dataset:
        """Make a data set that begins at `position` each time it is iterated from the beginning.

        Args:
            position: The epoch and step at which to begin.
            dealt: Whether batches include the numbers of samples.
            window: Number of batches to take, from this epoch and later ones; None for this epoch only.
            counts_readings: Whether each iteration reads another epoch, because nothing reports their ends.
        """
        readings = itertools.count()

        def numbers() -> Iterator[np.ndarray]:
            self.position.readings += 1
            epoch, step = position.epoch, position.step
            past = next(readings) if counts_readings else 0
            epochs = [past] if window is None else itertools.count()
            for later in epochs:
                # Add 1, because TensorFlow takes two zeros as "choose a random seed".
                seeds = np.random.SeedSequence((self._seed, epoch + later)).generate_state(2, np.uint32)
                yield np.array([int(seeds[0]) + 1, int(seeds[1]) + 1, 0 if later else step], np.int64)

        asked = tf.data.Dataset.from_generator(numbers, output_signature=tf.TensorSpec((3,), tf.int64))
        dataset = asked.flat_map(lambda drawn: self.pipeline.epoch(drawn[:2], drawn[2], dealt))
        if window is not None:
            dataset = dataset.take(window)
        elif self.steps is not None and position.step == 0:
            dataset = dataset.apply(tf.data.experimental.assert_cardinality(self.steps))
        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = False  # also in loops without fit; `adapters.untuned` explains why
        return dataset.with_options(options).prefetch(tf.data.AUTOTUNE)

    def _inputs(self) -> list[tf.data.Dataset]:
        return [self._derived]


def own_batch(dataset: tf.data.Dataset) -> int | None:
    """Return the rows of a data set's first batch, None if its elements are samples.

    Raises:
        ValueError: If the data set is endless or empty.
    """
    if any(isinstance(spec, tf.SparseTensorSpec) for spec in tf.nest.flatten(dataset.element_spec)):
        raise ValueError(
            "hvd.shard: sparse tensors cannot be divided by rows. Make them dense before hvd.shard: "
            "hvd.shard(dataset.map(lambda x, y: (tf.sparse.to_dense(x), y)), ...)."
        )
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "hvd.shard: this data set is endless, so it has no epochs that all samples could be seen once in. "
            "Leave out .repeat(), fit's epochs repeat it; or say what an epoch is: dataset.take(…)."
        )
    source = dataset_graph.before_shuffling(dataset)
    first = next(iter(source.take(1)), None)
    if dataset.cardinality() == 0 or first is None:
        raise ValueError("hvd.shard: the data set holds no samples.")
    if not dataset_graph.is_batched(dataset):
        return None
    known = dataset_graph.batch_size(dataset)
    if known is not None:
        return int(known)
    if source is not dataset:
        first = next(iter(dataset.take(1)))
    return int(tf.nest.flatten(first)[0].shape[0])


def tf_facts(dataset: tf.data.Dataset) -> structures.Facts:
    """Return the facts that must be the same on all ranks: structure, length, and the first targets."""
    source = dataset_graph.before_shuffling(dataset)
    element = next(iter(source.take(1)))
    _, y, _ = structures.unpacked(element) if source is dataset else (None, None, None)
    leaves = [leaf for leaf in tf.nest.flatten(element if y is None else y) if isinstance(leaf, tf.Tensor)]
    sums = " ".join(f"{structures.checksum(leaf.numpy()):08x}" for leaf in leaves)
    length = int(dataset.cardinality())
    return [
        ("the number of elements", "unknown" if length < 0 else str(length)),
        ("the structure of the elements", str(dataset.element_spec)),
        ("the first sample", f"checksum {sums}"),
    ]
