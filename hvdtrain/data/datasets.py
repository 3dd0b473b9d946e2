"""Implement `hvd.shard` for a `tf.data.Dataset`; the result is a `tf.data.Dataset` too."""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.collectives.engine import Call, Engine
from hvdtrain.data import dataset_graph, structures
from hvdtrain.data.collective_errors import together
from hvdtrain.data.pipelines import ByFiles, ByRows, Division, balanced, count_samples, own_files
from hvdtrain.data.position import Position
from hvdtrain.data.sample_plan import Plan

BUFFER = 10_000  # size of the shuffle buffer, in samples, for a data set of unknown length

_Starts = Iterator[tuple[int, int]]  # epochs to read, each with its first step


class ShardedTFDataset(tf.data.Dataset):
    """This rank's part of each global batch of a `tf.data.Dataset`, itself a `tf.data.Dataset`.

    Each time it has been read to its end a new epoch begins, with a new order if it is shuffled. Looking
    into it changes nothing. A data set made from it (`.map`, `.prefetch`, …) counts its own epochs.

    Args:
        pipeline: The division among the ranks.
        seed: Seed of the order, together with the epoch.
        position: The current epoch and step.
    """

    def __init__(self, pipeline: ByRows | ByFiles, seed: int, position: Position) -> None:
        self.pipeline = pipeline
        self.position = position
        self._seed = seed
        self._derived = self._built(_counting(position), False, position)
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
        if not tf.executing_eagerly():
            return super().__iter__()
        return self._read()

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
        self.position.next_epoch()

    def state(self) -> dict[str, int]:
        """Return the position of the training; see `ShardedDataset.state`."""
        epoch, step = self.position.at(self.position.done, self.steps or 2**62)
        return {"epoch": epoch, "step": step}

    def go_on(self, epoch: int, step: int, read: int) -> None:
        """Move to a position; see `ShardedDataset.go_on`."""
        if self.pipeline.division.reshuffled and runtime.engine().rank == 0:
            warnings.warn(
                "hvd.shard: this data set shuffles itself, in an order that depends on how often it has been read, "
                "so the resumed run reads it in another order than the run before. Leave its .shuffle() out and "
                "type hvd.shard(…, shuffle=True).",
                stacklevel=2,
            )
        self.position.epoch, self.position.step, self.position.done = epoch, step, 0

    def reading(
        self, position: Position, window: int | None, dealt: bool, class_weight: dict[int, float] | None
    ) -> tf.data.Dataset:
        """Return the same data from a position on, in the form that the Keras adapter reads."""
        if class_weight is not None:
            return self.weighted(class_weight).reading(position, window, dealt, None)
        return self._built(_at(position, window is not None), dealt, position, window)

    def weighted(self, class_weight: dict[int, float]) -> "ShardedTFDataset":
        """Return the same data at the same position, weighted by class."""
        division = dataclasses.replace(self.pipeline.division, class_weight=class_weight)
        weighted = dataclasses.replace(self.pipeline, division=division)
        return ShardedTFDataset(weighted, self._seed, self.position)

    def _read(self) -> Iterator[Any]:
        self.begin()
        for index, batch in enumerate(self.reading(self.position, None, False, None)):
            self.position.done = index + 1
            yield batch
        self.end()

    def _built(
        self, starts: Callable[[], _Starts], dealt: bool, position: Position, window: int | None = None
    ) -> tf.data.Dataset:
        """Make a data set that calls `starts` for epoch and step whenever it is iterated from the beginning."""

        def numbers() -> Iterator[np.ndarray]:
            self.position.readings += 1
            for epoch, step in starts():
                # Add 1, because TensorFlow takes two zeros as "choose a random seed".
                seeds = np.random.SeedSequence((self._seed, epoch)).generate_state(2, np.uint32)
                yield np.array([int(seeds[0]) + 1, int(seeds[1]) + 1, step], np.int64)

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


def _at(position: Position, endless: bool) -> Callable[[], _Starts]:
    """Return a function that yields the epoch of `position` and, if `endless`, all later ones."""

    def starts() -> _Starts:
        first = position.epoch
        yield first, position.step
        yield from ((first + later, 0) for later in (itertools.count(1) if endless else ()))

    return starts


def _counting(position: Position) -> Callable[[], _Starts]:
    """Return a function that yields one epoch a call, counted here because nothing reports its end."""
    readings = itertools.count()

    def starts() -> _Starts:
        reading = next(readings)
        yield position.epoch + reading, 0 if reading else position.step

    return starts


def tf_pipeline(
    dataset: tf.data.Dataset,
    own: int | None,
    batch_size: int,
    engine: Engine,
    shuffle: bool | int,
    keep: bool,
) -> ByRows | ByFiles:
    """Choose the division of a data set: by files where that is balanced, else by rows. All ranks call it.

    Args:
        dataset: The user's data set.
        own: Rows of its batches; None if its elements are samples.
        batch_size: The global batch.
        engine: The ranks.
        shuffle: Whether to shuffle, or the size of the shuffle buffer in samples.
        keep: Whether a last batch that is not full is trained on.

    Raises:
        ValueError: If the ranks would read it in different orders.
    """
    batched = own is not None
    reshuffled = dataset_graph.reshuffles(dataset)
    division = Division(
        batch_size, engine.rank, engine.size, keep, _buffer(dataset, shuffle, own), reshuffled
    )
    if engine.size > 1 and dataset_graph.reads_files(dataset):
        counts = _file_counts(dataset, batched, engine)
        if counts and balanced(counts, division):
            mine = own_files(dataset, engine.rank, engine.size)
            return ByFiles(mine.unbatch() if batched else mine, counts, division)
    _refuse_other_orders(dataset, engine)
    return _by_rows(dataset, own, division)


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
    first = next(iter(dataset_graph.before_shuffling(dataset).take(1)), None)
    if dataset.cardinality() == 0 or first is None:
        raise ValueError("hvd.shard: the data set holds no samples.")
    if not dataset_graph.is_batched(dataset):
        return None
    known = dataset_graph.batch_size(dataset)
    if known is not None:
        return int(known)
    if dataset_graph.before_shuffling(dataset) is not dataset:
        first = next(iter(dataset.take(1)))
    return int(tf.nest.flatten(first)[0].shape[0])


def refuse_to_resume(dataset: tf.data.Dataset, epoch: int, step: int) -> None:
    """Raise ValueError if a run would resume with data whose order cannot be repeated."""
    if (epoch or step) and dataset_graph.reshuffles(dataset):
        raise ValueError(
            "hvd.shard: this data set shuffles itself, in an order that depends on how often it has been read, so "
            f"a run cannot be resumed with it. Received: epoch={epoch}, step={step}. Leave its .shuffle() out and "
            "type hvd.shard(…, shuffle=True), from the first epoch on; or use "
            ".shuffle(…, reshuffle_each_iteration=False)."
        )


def tf_facts(dataset: tf.data.Dataset) -> list[tuple[str, str]]:
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


def _by_rows(dataset: tf.data.Dataset, own: int | None, division: Division) -> ByRows:
    batched, wanted, length = own is not None, division.batch_size, int(dataset.cardinality())
    inner = [spec.shape[1:] for spec in tf.nest.flatten(dataset.element_spec)] if batched else []
    whole = batched and own == wanted and not (division.buffer and all(s.is_fully_defined() for s in inner))
    if whole:
        steps = length if length >= 0 and division.keep else None
        return ByRows(dataset, True, division, steps, division.keep)
    if batched:
        return ByRows(dataset.unbatch(), False, division, None, division.keep)
    if length < 0:
        return ByRows(dataset, False, division, None, division.keep)
    plan = Plan(length, wanted, remainder="keep" if division.keep else "drop")
    return ByRows(dataset, False, division, plan.steps, plan.partial)


def _buffer(dataset: tf.data.Dataset, shuffle: bool | int, own: int | None) -> int:
    if not isinstance(shuffle, bool | np.bool_):
        return int(shuffle)
    length = int(dataset.cardinality()) * (own or 1)
    return (length if length > 0 else BUFFER) if shuffle else 0


def _file_counts(dataset: tf.data.Dataset, batched: bool, engine: Engine) -> tuple[int, ...] | None:
    """Count the samples in each rank's files, reading them once; None if they cannot be divided."""

    def count() -> int | None:
        try:
            return count_samples(own_files(dataset, engine.rank, engine.size), batched)
        except (tf.errors.NotFoundError, tf.errors.InvalidArgumentError):
            return None  # fewer files than ranks, or files opened by code that TensorFlow cannot shard

    counts = engine.allgather_object(together(engine, "hvd.shard, counting samples", count))
    return None if None in counts else tuple(counts)


def _refuse_other_orders(dataset: tf.data.Dataset, engine: Engine) -> None:
    """Raise ValueError unless all ranks read the same sequence, of which each takes its part."""
    if engine.size == 1:
        return
    orders = engine.allgather_object(
        "deterministic=False"
        if dataset_graph.in_any_order(dataset)
        else f"shuffle seeds {dataset_graph.seeds(dataset)}"
    )
    unseeded = dataset_graph.shuffles_without_seed(dataset)
    if unseeded or len(set(orders)) > 1 or "deterministic=False" in orders:
        listed = "\n".join(f"  rank {rank}: {order}" for rank, order in enumerate(orders))
        raise ValueError(
            f"hvd.shard: each rank would read this data set in its own order (0 is no seed).\n{listed}\n"
            "Each takes its part of the same sequence, so samples would be missed and others seen twice. Leave "
            "shuffling to hvd.shard(…, shuffle=True); or call keras.utils.set_random_seed(0), the same number "
            "on all ranks, before you make the data set, and leave out deterministic=False."
        )
