"""Divide a `tf.data.Dataset`: every rank takes its rows of each global batch, or reads its own files."""

import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain.collectives.engine import Engine
from hvdtrain.data import dataset_graph
from hvdtrain.data.collective_errors import together
from hvdtrain.data.global_batch import Dealt, packed, refuse_both
from hvdtrain.data.sample_plan import Plan
from hvdtrain.data.structures import unpacked

BUFFER = 10_000  # size of the shuffle buffer, in samples, for a data set of unknown length

_FILE_POLICY = 1  # AutoShardPolicy.FILE


@dataclasses.dataclass(frozen=True)
class Division:
    """Parameters of the division among ranks, for files and for rows."""

    batch_size: int
    rank: int
    size: int
    keep: bool  # whether a last batch that is not full is trained on; else it is left out
    buffer: int  # size of the shuffle buffer in samples; 0 keeps the order
    reshuffled: bool  # whether the user's data set shuffles itself again each time it is read
    class_weight: dict[int, float] | None

    @property
    def rows(self) -> int:
        """Rows of one rank in each step."""
        return self.batch_size // self.size


@dataclasses.dataclass(frozen=True)
class ByRows:
    """Division by rows: every rank reads all samples and takes its rows of each global batch."""

    dataset: tf.data.Dataset
    batched: bool  # whether the elements are global batches already, instead of samples
    division: Division
    steps: int | None  # global batches per epoch; None if unknown
    partial: bool  # whether a batch may not be full

    def epoch(self, seeds: tf.Tensor, start: tf.Tensor, dealt: bool) -> tf.data.Dataset:
        """Return this rank's part of the batches of one epoch, from step `start` on."""
        dataset = _shuffled(self.dataset, self.division.buffer, seeds)
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
    """Division by files: every rank reads its own files."""

    dataset: tf.data.Dataset  # the samples of this rank's files
    counts: tuple[int, ...]  # number of samples of each rank
    division: Division

    @property
    def steps(self) -> int:
        """Steps per epoch, the same on all ranks."""
        rows = self.division.rows
        return -(-max(self.counts) // rows) if self.division.keep else min(self.counts) // rows

    @property
    def partial(self) -> bool:
        """Whether some global batch is not full."""
        return self.division.keep and min(self.counts) < self.steps * self.division.rows

    @property
    def balanced(self) -> bool:
        """Whether this gives as many steps as division by samples, and every rank has samples."""
        total, batch_size = sum(self.counts), self.division.batch_size
        best = -(-total // batch_size) if self.division.keep else total // batch_size
        return min(self.counts) > 0 and self.steps == best

    def epoch(self, seeds: tf.Tensor, start: tf.Tensor, dealt: bool) -> tf.data.Dataset:
        """Return the batches of one epoch, from step `start` on."""
        rows = self.division.rows
        samples = _shuffled(self.dataset, self.division.buffer, seeds)
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


def tf_pipeline(
    dataset: tf.data.Dataset,
    own: int | None,
    batch_size: int,
    engine: Engine,
    shuffle: bool | int,
    keep: bool,
    class_weight: dict[int, float] | None,
) -> ByRows | ByFiles:
    """Choose the division of a data set: by files where that is balanced, else by rows. All ranks call it.

    Args:
        own: Rows of the data set's batches; None if its elements are samples.
        shuffle: Whether to shuffle, or the size of the shuffle buffer in samples.

    Raises:
        ValueError: If the ranks would read it in different orders.
    """
    reshuffled, buffer = dataset_graph.reshuffles(dataset), _buffer(dataset, shuffle, own)
    division = Division(batch_size, engine.rank, engine.size, keep, buffer, reshuffled, class_weight)
    if engine.size > 1 and dataset_graph.reads_files(dataset):
        counts = _file_counts(dataset, own is not None, engine)
        if counts is not None:
            mine = _own_files(dataset, engine)
            by_files = ByFiles(mine if own is None else mine.unbatch(), counts, division)
            if by_files.balanced:
                return by_files
    dataset_graph.refuse_other_orders(dataset, engine)
    return _by_rows(dataset, own, division)


def _by_rows(dataset: tf.data.Dataset, own: int | None, division: Division) -> ByRows:
    batched, length = own is not None, int(dataset.cardinality())
    inner = [spec.shape[1:] for spec in tf.nest.flatten(dataset.element_spec)] if batched else []
    by_samples = division.buffer and all(
        shape.is_fully_defined() for shape in inner
    )  # shuffled after unbatching
    if own == division.batch_size and not by_samples:
        steps = length if length >= 0 and division.keep else None
        return ByRows(dataset, True, division, steps, division.keep)
    if batched:
        return ByRows(dataset.unbatch(), False, division, None, division.keep)
    if length < 0:
        return ByRows(dataset, False, division, None, division.keep)
    plan = Plan(length, division.batch_size, remainder="keep" if division.keep else "drop")
    return ByRows(dataset, False, division, plan.steps, plan.partial)


def _buffer(dataset: tf.data.Dataset, shuffle: bool | int, own: int | None) -> int:
    if not isinstance(shuffle, bool | np.bool_):
        return int(shuffle)
    length = int(dataset.cardinality()) * (own or 1)
    return (length if length > 0 else BUFFER) if shuffle else 0


def _file_counts(dataset: tf.data.Dataset, batched: bool, engine: Engine) -> tuple[int, ...] | None:
    """Count the samples in each rank's files, reading them once; None if they cannot be divided."""

    def count() -> int | None:
        rows = (lambda *batch: _count(batch)) if batched else (lambda *sample: tf.constant(1, tf.int64))
        try:
            counts = _own_files(dataset, engine).map(rows)
            return int(counts.reduce(tf.constant(0, tf.int64), lambda total, count: total + count))
        except (tf.errors.NotFoundError, tf.errors.InvalidArgumentError):
            return None  # fewer files than ranks, or files opened by code that TensorFlow cannot shard

    counts = engine.allgather_object(together(engine, "hvd.shard, counting samples", count))
    return None if None in counts else tuple(counts)


def _own_files(dataset: tf.data.Dataset, engine: Engine) -> tf.data.Dataset:
    """Let a rank open every size-th file only, by TensorFlow's auto-sharding of the reading operation."""
    variant = tf.raw_ops.AutoShardDataset(
        input_dataset=tf.data.experimental.to_variant(dataset),
        num_workers=engine.size,
        index=engine.rank,
        auto_shard_policy=_FILE_POLICY,
        num_replicas=engine.size,
        **_output(dataset),
    )
    return tf.data.experimental.from_variant(variant, dataset.element_spec)


def _shuffled(dataset: tf.data.Dataset, buffer: int, seeds: tf.Tensor) -> tf.data.Dataset:
    """Shuffle with exactly these seeds: `shuffle(seed=)` would also use each process's global seed."""
    if not buffer:
        return dataset
    variant = tf.raw_ops.ShuffleDataset(
        input_dataset=tf.data.experimental.to_variant(dataset),
        buffer_size=tf.constant(buffer, tf.int64),
        seed=seeds[0],
        seed2=seeds[1],
        reshuffle_each_iteration=False,
        **_output(dataset),
    )
    return tf.data.experimental.from_variant(variant, dataset.element_spec)


def _output(dataset: tf.data.Dataset) -> dict[str, Any]:
    return {
        "output_types": tf.nest.flatten(tf.compat.v1.data.get_output_types(dataset)),
        "output_shapes": tf.nest.flatten(tf.compat.v1.data.get_output_shapes(dataset)),
    }


def _count(batch: Any) -> tf.Tensor:
    first = tf.nest.flatten(batch)[0]
    return first.nrows() if isinstance(first, tf.RaggedTensor) else tf.shape(first, tf.int64)[0]


def _dealt(batch: Any, own: tf.Tensor, total: tf.Tensor, division: Division, dealt: bool) -> Any:
    """Return a rank's rows of a global batch, as `Part` does for arrays: dealt or weighted."""
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
