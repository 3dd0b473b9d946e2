"""Implement `hvd.shard`: every sample once per epoch over all ranks, and the same number of steps on each."""

import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.collectives.engine import Engine
from hvdtrain.data import dataset_graph, datasets, structures
from hvdtrain.data.collective_errors import compare, together
from hvdtrain.data.pipelines import tf_pipeline
from hvdtrain.data.sample_plan import Plan, Position
from hvdtrain.data.sharded_dataset import ShardedDataset, ShardedGenerator
from hvdtrain.data.sources import ArraySource, BatchSource, batch_rows

_ADVICE = (
    "hvd.shard gives each rank its part of the whole: load the same data with the same arguments on every rank. "
    "If each rank has loaded its own part already, give that to fit as it is. If a random order or split was "
    "drawn while loading, call keras.utils.set_random_seed(0), the same number on all ranks, before it."
)

_OF_A_GENERATOR = (
    "hvd.shard: of a generator neither length nor order is known. Every rank runs all of it and takes its rows, so "
    "it must yield the same batches on all ranks (the same random seed), and as many. A keras.utils.PyDataset or a "
    "tf.data.Dataset can be checked, shuffled and resumed."
)

_NO_INTEGER = "hvd.shard: {name} must be an integer. Received: {name}={value!r}."

# The types that `hvd.shard` returns.
Sharded = ShardedDataset | datasets.ShardedTFDataset | ShardedGenerator

_Read = tuple[Callable[[], Any], structures.Facts]


def shard(
    data: Any,
    batch_size: int | None = None,
    shuffle: bool | int | None = None,
    seed: int = 0,
    remainder: str = "keep",
    *,
    class_weight: dict[int, float] | None = None,
    epoch: int = 0,
    step: int = 0,
) -> Any:
    """Give each rank its part of the data: an epoch sees every sample exactly once, in equal steps on all ranks.

    Load the same, whole data on every rank and call this on every rank; both are checked. Pass the result
    to `model.fit` without `batch_size`. N ranks then learn what one process learns from the same batches:
    step s of an epoch holds the same samples whatever N is, and averages are over samples, not over ranks.

    The order is drawn from `(seed, epoch)` alone (Philox; Salmon et al. 2011, "Parallel random numbers: as easy
    as 1, 2, 3"), so all ranks compute it without communication.

    Args:
        data: One of
            - arrays: x, (x, y) or (x, y, sample_weight), each an array of shape (samples, …) or a dict or
              tuple of such arrays;
            - a `tf.data.Dataset` of samples or of batches. Records from files are divided by files where
              that needs no extra step (the files are read once to count), else each rank takes its rows of
              every batch;
            - a `keras.utils.PyDataset`, whose batches are global batches, or, with a `batch_size` that gives
              each rank whole batches, the batches of one rank;
            - a generator of global batches, whose length and order cannot be checked.
        batch_size: Samples per step over all ranks; a multiple of the number of ranks. It may be left out for data
            that is batched already, except for a generator.
        shuffle: Whether each epoch has a new order. By default arrays and PyDatasets are shuffled, as in
            `fit`, and a `tf.data.Dataset` keeps its own order. For a `tf.data.Dataset` also the number of
            samples to shuffle among; True means all, or 10000 where the length is unknown.
        seed: Seed of the order, together with the epoch; the same on all ranks.
        remainder: Treatment of a last batch that is not full. "keep" trains on it: the ranks' parts then
            differ by one sample, and are weighted by their number of samples; "drop" leaves it out.
        class_weight: Weight of each class, as in `fit`.
        epoch: The epoch to begin with, as `state()` of the result returned it.
        step: The number of steps of that epoch that are done, as `state()` of the result returned it.

    Returns:
        Data for `model.fit`, `model.evaluate` or a loop: a `keras.utils.PyDataset`, for a `tf.data.Dataset` a
        `tf.data.Dataset`, for a generator an iterator. `fit` reads the structure that was given; a loop gets
        (x, y, sample_weight), with "drop" (x, y) if there are no weights. `len()` is the number of steps.

    Raises:
        ValueError: On every rank, if an argument has an invalid value, `batch_size` is not a multiple of the
            number of ranks (the nearest are named), arrays differ in length (each is named), or the data is empty
            or endless.
        TypeError: If `batch_size`, `seed`, `epoch` or `step` is no integer, `class_weight` is no dict, or the data
            has another type.
        MismatchError: On every rank, if the ranks hold different data or pass different arguments.
        RuntimeError: If another rank cannot read its data; its error is quoted.
    """
    engine = runtime.engine()
    if engine.size > 1:
        # A complete file holds all samples, unless each rank reads some of the files.
        divided = isinstance(data, tf.data.Dataset) and dataset_graph.reads_files(data)
        files = dataset_graph.cache_files(data, whole=not divided)
        dataset_graph.refuse_common_caches(engine, "hvd.shard", files)

    def read() -> _Read:
        request = _Request(data, engine, batch_size, shuffle, seed, remainder, class_weight, epoch, step)
        make, facts = request.read()
        return make, [*request.facts(), *facts]

    make, facts = together(engine, "hvd.shard", read)
    compare(engine, "hvd.shard", facts, _ADVICE)
    result = make()
    if isinstance(result, ShardedGenerator) and engine.rank == 0:
        warnings.warn(_OF_A_GENERATOR, stacklevel=2)
    return result


@dataclass
class _Request:
    """The data of one rank and the arguments of `hvd.shard`, which it checks.

    The methods that read the data do not communicate. They return a function that makes the result, which may, and
    the facts that all ranks compare before.
    """

    data: Any
    engine: Engine
    batch_size: Any
    shuffle: Any
    seed: Any
    remainder: Any
    class_weight: Any
    epoch: Any
    step: Any

    def __post_init__(self) -> None:
        self.seed = _count(self.seed, "seed")
        self.epoch = _count(self.epoch, "epoch")
        self.step = _count(self.step, "step")
        if self.batch_size is not None:
            self.batch_size = checked_batch_size(self.batch_size, self.engine.size)
        if self.shuffle is not None and not isinstance(self.shuffle, bool):
            self.shuffle = _count(self.shuffle, "shuffle")
        if self.remainder == "pad":  # the name of "keep" up to version 0.1
            self.remainder = "keep"
        if self.remainder not in ("keep", "drop"):
            raise ValueError(
                "hvd.shard: remainder must be 'keep' (train on a last batch that is not full) or 'drop' (leave it "
                f"out). Received: remainder={self.remainder!r}."
            )
        if isinstance(self.data, Sharded):
            raise ValueError("hvd.shard: this data is sharded already.")
        if not isinstance(self.class_weight, dict | None):
            raise TypeError(
                "hvd.shard: class_weight must be a dict of class numbers and weights, such as {0: 1.0, 1: 2.5}. "
                f"Received: class_weight={self.class_weight!r}."
            )

    def facts(self) -> structures.Facts:
        names = ("batch_size", "shuffle", "seed", "remainder", "epoch", "step")
        arguments = [(name, f"{name}={getattr(self, name)!r}") for name in names]
        return [("the kind of data", type(self.data).__name__), *arguments]

    def read(self) -> _Read:
        if isinstance(self.data, tf.data.Dataset):
            return self._read_tf()
        if isinstance(self.data, keras.utils.PyDataset):
            return self._read_batches()
        if isinstance(self.data, Iterator):
            return self._read_generator()
        return self._read_arrays()

    def _read_arrays(self) -> _Read:
        engine, batch_size = self.engine, checked_batch_size(self.batch_size, self.engine.size)
        x, y, weight = structures.all_arrays(structures.unpacked(self.data))
        if weight is not None and y is None:
            raise ValueError("hvd.shard: a sample_weight without targets y has no use in Keras.")
        length, shuffle = structures.length((x, y, weight)), self.shuffle is None or bool(self.shuffle)
        plan = Plan(length, batch_size, engine.rank, engine.size, shuffle, self.seed, self.remainder)
        return self._sharded(ArraySource(x, y, weight, plan))

    def _read_batches(self) -> _Read:
        engine, shuffle = self.engine, self.shuffle is None or bool(self.shuffle)
        rows = batch_rows(self.data, self.batch_size, engine.size)
        source = BatchSource(self.data, *rows, engine.rank, engine.size, shuffle, self.seed, self.remainder)
        for past in range(self.epoch):
            source.begin(past)
            source.end(past)
        return self._sharded(source)

    def _sharded(self, source: ArraySource | BatchSource) -> _Read:
        weighted = source if self.class_weight is None else source.weighted(self.class_weight)
        position = self._position(source.steps)
        return lambda: ShardedDataset(weighted, position), source.facts()

    def _read_tf(self) -> _Read:
        if (self.epoch or self.step) and dataset_graph.reshuffles(self.data):
            raise ValueError(
                "hvd.shard: this data set shuffles itself, in an order that depends on how often it has been read, "
                f"so a run cannot be resumed with it. Received: epoch={self.epoch}, step={self.step}. Leave its "
                ".shuffle() out and type hvd.shard(…, shuffle=True), from the first epoch on; or "
                ".shuffle(…, reshuffle_each_iteration=False)."
            )
        own = datasets.own_batch(self.data)
        wanted = own if self.batch_size is None else self.batch_size
        batch_size = checked_batch_size(wanted, self.engine.size)
        shuffle, keep = self.shuffle or False, self.remainder == "keep"

        def make() -> datasets.ShardedTFDataset:
            pipeline = tf_pipeline(self.data, own, batch_size, self.engine, shuffle, keep, self.class_weight)
            return datasets.ShardedTFDataset(pipeline, self.seed, self._position(pipeline.steps))

        return make, datasets.tf_facts(self.data)

    def _read_generator(self) -> _Read:
        engine, batch_size = self.engine, checked_batch_size(self.batch_size, self.engine.size)
        if self.shuffle or self.epoch or self.step:
            raise ValueError(
                "hvd.shard: a generator can be neither shuffled nor begun in its middle; shuffle, epoch and step "
                "are for arrays, tf.data.Dataset and keras.utils.PyDataset."
            )
        keep = self.remainder == "keep"
        result = ShardedGenerator(self.data, batch_size, engine.rank, engine.size, keep, self.class_weight)
        return lambda: result, []

    def _position(self, steps: int | None) -> Position:
        if steps is not None and self.step >= steps:
            raise ValueError(
                f"hvd.shard: step must be one of the {steps} steps of an epoch, 0 to {steps - 1}. Received: "
                f"step={self.step}."
            )
        return Position(self.epoch, self.step)


def checked_batch_size(batch_size: Any, size: int) -> int:
    """Return the global batch as an int.

    Raises:
        ValueError: If it is missing, not positive, or not a multiple of the number of ranks; the nearest are named.
        TypeError: If it is no integer.
    """
    if batch_size is None:
        raise ValueError(
            "hvd.shard: batch_size is missing. Give the number of samples a step over all ranks, for example "
            f"batch_size={32 * size}, which is 32 on each of the {size} ranks."
        )
    if isinstance(batch_size, bool | np.bool_):
        raise TypeError(_NO_INTEGER.format(name="batch_size", value=batch_size))
    number = _integer(batch_size, "batch_size")
    if number < 1 or number % size:
        below = number // size * size
        nearest = f"{below} or {below + size}" if below > 0 else str(size)
        raise ValueError(
            f"hvd.shard: batch_size is the global batch and must divide by the {size} ranks. Received: "
            f"batch_size={number}. Nearest: {nearest}."
        )
    return number


def _count(value: Any, name: str) -> int:
    number = _integer(value, name)
    if number < 0:
        raise ValueError(f"hvd.shard: {name} must be 0 or more. Received: {name}={value!r}.")
    return number


def _integer(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(_NO_INTEGER.format(name=name, value=value)) from None
