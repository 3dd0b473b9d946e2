"""Divide a `tf.data.Dataset`: every rank takes its rows of each global batch, or reads its own files."""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from hvdtrain.data.global_batch import Dealt
from hvdtrain.data.local_batch import packed, refuse_both
from hvdtrain.data.structures import unpacked

_FILE_POLICY = 1  # AutoShardPolicy.FILE


@dataclasses.dataclass(frozen=True)
class Division:
    """Parameters of the division among ranks, for files and for rows.

    Args:
        batch_size: The global batch.
        rank: This rank.
        size: Number of ranks.
        keep: Whether a last batch that is not full is trained on; else it is left out.
        buffer: Size of the shuffle buffer in samples; 0 keeps the order.
        reshuffled: Whether the user's data set shuffles itself again each time it is read.
        class_weight: Weights by class, or None.
    """

    batch_size: int
    rank: int
    size: int
    keep: bool
    buffer: int
    reshuffled: bool = False
    class_weight: dict[int, float] | None = None

    @property
    def rows(self) -> int:
        """Rows of one rank in each step."""
        return self.batch_size // self.size


@dataclasses.dataclass(frozen=True)
class ByRows:
    """Division by rows: every rank reads all samples and takes its rows of each global batch.

    Args:
        dataset: Samples, or global batches.
        batched: Whether they are global batches already.
        division: Parameters of the division.
        steps: Global batches per epoch; None if unknown.
        partial: Whether a batch may not be full.
    """

    dataset: tf.data.Dataset
    batched: bool
    division: Division
    steps: int | None
    partial: bool

    def epoch(self, seeds: tf.Tensor, start: tf.Tensor, dealt: bool) -> tf.data.Dataset:
        """Return this rank's part of the batches of one epoch, from step `start` on."""
        dataset = shuffled(self.dataset, self.division.buffer, seeds)
        if not self.batched:
            dataset = dataset.batch(self.division.batch_size, drop_remainder=not self.division.keep)
        elif not self.division.keep:
            dataset = dataset.filter(lambda *batch: _count(batch) == self.division.batch_size)
        parted = lambda *batch: self._part(batch, dealt)  # noqa: E731
        return dataset.skip(start).map(parted, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def _part(self, batch: Any, dealt: bool) -> Any:
        total, division = _count(batch), self.division
        if division.size == 1:
            return _dealt(batch, total, total, division, dealt)
        slots = division.rank + division.size * tf.range(division.rows, dtype=tf.int64)
        own = tf.reduce_sum(tf.cast(slots < total, tf.int64))
        if division.keep:  # else all batches are full, and the static number of rows is kept
            slots = slots[: tf.maximum(own, 1)] % total
        taken = tf.nest.map_structure(lambda leaf: tf.gather(leaf, slots), batch)
        return _dealt(taken, own, total, division, dealt)


@dataclasses.dataclass(frozen=True)
class ByFiles:
    """Division by files: every rank reads its own files.

    Args:
        dataset: The samples of this rank's files.
        counts: Number of samples of each rank.
        division: Parameters of the division.
    """

    dataset: tf.data.Dataset
    counts: tuple[int, ...]
    division: Division

    @property
    def steps(self) -> int:
        """Steps per epoch, the same on all ranks."""
        return _steps(self.counts, self.division)

    @property
    def partial(self) -> bool:
        """Whether some global batch is not full."""
        return self.division.keep and min(self.counts) < self.steps * self.division.rows

    def epoch(self, seeds: tf.Tensor, start: tf.Tensor, dealt: bool) -> tf.data.Dataset:
        """Return the batches of one epoch, from step `start` on."""
        rows = self.division.rows
        samples = shuffled(self.dataset, self.division.buffer, seeds)
        # All ranks take the same number of steps: a rank without further samples reads some again, with weight 0.
        batches = samples.repeat().take(self.steps * rows).batch(rows, drop_remainder=True).enumerate()
        parted = lambda step, batch: self._part(step, batch, dealt)  # noqa: E731
        return batches.skip(start).map(parted, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def _part(self, step: tf.Tensor, batch: Any, dealt: bool) -> Any:
        rows = self.division.rows
        held = tf.clip_by_value(tf.constant(self.counts, tf.int64) - step * rows, 0, rows)
        own, total = held[self.division.rank], tf.reduce_sum(held)
        if self.division.keep:
            batch = tf.nest.map_structure(lambda leaf: leaf[: tf.maximum(own, 1)], batch)
        return _dealt(batch if isinstance(batch, tuple) else (batch,), own, total, self.division, dealt)


def own_files(dataset: tf.data.Dataset, rank: int, size: int) -> tf.data.Dataset:
    """Let a rank open every size-th file only, by TensorFlow's auto-sharding of the reading operation."""
    specs = {
        "output_types": tf.nest.flatten(tf.compat.v1.data.get_output_types(dataset)),
        "output_shapes": tf.nest.flatten(tf.compat.v1.data.get_output_shapes(dataset)),
    }
    variant = tf.raw_ops.AutoShardDataset(
        input_dataset=tf.data.experimental.to_variant(dataset),
        num_workers=size,
        index=rank,
        auto_shard_policy=_FILE_POLICY,
        num_replicas=size,
        **specs,
    )
    return tf.data.experimental.from_variant(variant, dataset.element_spec)


def count_samples(dataset: tf.data.Dataset, batched: bool) -> int:
    """Read a data set once and count its samples."""
    rows = (lambda *batch: _count(batch)) if batched else (lambda *sample: tf.constant(1, tf.int64))
    return int(dataset.map(rows).reduce(tf.constant(0, tf.int64), lambda total, count: total + count))


def balanced(counts: tuple[int, ...], division: Division) -> bool:
    """Return whether division by files gives as many steps as division by samples, and every rank has samples."""
    total = sum(counts)
    best = -(-total // division.batch_size) if division.keep else total // division.batch_size
    return min(counts) > 0 and _steps(counts, division) == best


def shuffled(dataset: tf.data.Dataset, buffer: int, seeds: tf.Tensor) -> tf.data.Dataset:
    """Shuffle with exactly these seeds: `shuffle(seed=)` would also use each process's global seed."""
    if not buffer:
        return dataset
    variant = tf.raw_ops.ShuffleDataset(
        input_dataset=tf.data.experimental.to_variant(dataset),
        buffer_size=tf.constant(buffer, tf.int64),
        seed=seeds[0],
        seed2=seeds[1],
        output_types=tf.nest.flatten(tf.compat.v1.data.get_output_types(dataset)),
        output_shapes=tf.nest.flatten(tf.compat.v1.data.get_output_shapes(dataset)),
        reshuffle_each_iteration=False,
    )
    return tf.data.experimental.from_variant(variant, dataset.element_spec)


def _steps(counts: tuple[int, ...], division: Division) -> int:
    return -(-max(counts) // division.rows) if division.keep else min(counts) // division.rows


def _count(batch: Any) -> tf.Tensor:
    first = tf.nest.flatten(batch)[0]
    return first.nrows() if isinstance(first, tf.RaggedTensor) else tf.shape(first, tf.int64)[0]


def _dealt(batch: Any, own: tf.Tensor, total: tf.Tensor, division: Division, dealt: bool) -> Any:
    """Return a rank's rows of a global batch, as `Part` does for arrays.

    Args:
        batch: The rows, in a tuple of x, y and sample_weight.
        own: How many of them are samples of this rank; if 0, there is one row with weight 0.
        total: How many samples the global batch holds.
        division: Parameters of the division.
        dealt: Whether to return the numbers of samples; else the weights include them.
    """
    x, y, weight = unpacked(batch)
    if division.class_weight is not None:
        refuse_both(weight)
        weight = _class_weights(y, division.class_weight)
    if dealt:
        batch = packed(x, y, weight)
        return batch if division.size == 1 else Dealt(batch, tf.stack([own, total]))
    if weight is None and division.keep and y is not None:
        weight = tf.ones([tf.maximum(own, 1)], keras.config.floatx())
    if weight is not None:
        factor = own * division.size / total
        weight = tf.nest.map_structure(lambda leaf: _times(leaf, factor), weight)
    return packed(x, y, weight)


def _times(weight: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    weight = tf.cast(weight, keras.config.floatx())
    return weight * tf.cast(factor, weight.dtype)


def _class_weights(y: Any, class_weight: dict[int, float]) -> tf.Tensor:
    if not tf.is_tensor(y):
        raise ValueError("hvd.shard: class_weight needs one tensor of targets. Received: several, or none.")
    if y.shape.rank > 1:
        y = tf.argmax(y, -1) if y.shape[-1] != 1 else tf.squeeze(y, -1)
    numbers = tf.cast(tf.round(y) if y.dtype.is_floating else y, tf.int64)
    result = tf.ones(tf.shape(numbers), keras.config.floatx())
    for number, weight in class_weight.items():
        result = tf.where(numbers == int(number), tf.cast(weight, result.dtype), result)
    return result
