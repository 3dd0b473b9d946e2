"""Implement `hvd.shard`: every sample once per epoch over all ranks, and the same number of steps on each."""

import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.collectives.engine import Engine
from hvdtrain.data import caches, dataset_graph, datasets
from hvdtrain.data.arrays import array_source
from hvdtrain.data.collective_errors import compare, together
from hvdtrain.data.generators import ShardedGenerator
from hvdtrain.data.position import Position
from hvdtrain.data.pydataset import BatchSource, batch_source
from hvdtrain.data.sample_plan import Plan, checked_batch_size, checked_count, checked_remainder
from hvdtrain.data.sharded_dataset import ShardedDataset

_ADVICE = (
    "hvd.shard gives each rank its part of the whole: load the same data with the same arguments on every rank. "
    "If each rank has loaded its own part already, give that to fit as it is. If a random order or split was "
    "drawn while loading, call keras.utils.set_random_seed(0), the same number on all ranks, before it."
)

_OF_A_GENERATOR = (
    "of a generator neither length nor order is known. Every rank runs all of it and takes its rows, so it must "
    "yield the same batches on all ranks (the same random seed), and as many. A keras.utils.PyDataset or a "
    "tf.data.Dataset can be checked, shuffled and resumed."
)

# The types that `hvd.shard` returns.
Sharded = ShardedDataset | datasets.ShardedTFDataset | ShardedGenerator

_Found = tuple[Callable[[], Any], list[tuple[str, str]], str | None]


@dataclass(frozen=True)
class _Request:
    """The arguments of `hvd.shard`, checked."""

    batch_size: Any
    shuffle: bool | int | None
    seed: int
    remainder: str
    epoch: int
    step: int

    def facts(self) -> list[tuple[str, str]]:
        return [(name, f"{name}={value!r}") for name, value in vars(self).items()]

    def shuffled(self, default: bool) -> bool:
        return default if self.shuffle is None else bool(self.shuffle)


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
        caches.refuse_common(engine, "hvd.shard", caches.files_of(data, whole=not divided))
    local = _Local(data, engine, class_weight)
    make, facts, notice = together(
        engine,
        "hvd.shard",
        lambda: local.read(_checked(batch_size, shuffle, seed, remainder, epoch, step, engine)),
    )
    compare(engine, "hvd.shard", facts, _ADVICE)
    if notice and engine.rank == 0:
        warnings.warn(f"hvd.shard: {notice}", stacklevel=2)
    return make()


def _checked(
    batch_size: Any, shuffle: Any, seed: Any, remainder: Any, epoch: Any, step: Any, engine: Engine
) -> _Request:
    counts = [checked_count(seed, "seed"), checked_count(epoch, "epoch"), checked_count(step, "step")]
    size = None if batch_size is None else checked_batch_size(batch_size, engine.size)
    if shuffle is not None and not isinstance(shuffle, bool):
        shuffle = checked_count(shuffle, "shuffle")
    return _Request(size, shuffle, counts[0], checked_remainder(remainder), *counts[1:])


@dataclass(frozen=True)
class _Local:
    """The data of one rank, read without communication."""

    data: Any
    engine: Engine
    class_weight: dict[int, float] | None

    def read(self, request: _Request) -> _Found:
        """Return a function that makes the result, the facts that all ranks compare, and a warning or None."""
        kinds = [("the kind of data", type(self.data).__name__), *request.facts()]
        if isinstance(self.data, Sharded):
            raise ValueError("hvd.shard: this data is sharded already.")
        if not isinstance(self.class_weight, dict | None):
            raise TypeError(
                "hvd.shard: class_weight must be a dict of class numbers and weights, such as {0: 1.0, 1: 2.5}. "
                f"Received: class_weight={self.class_weight!r}."
            )
        if isinstance(self.data, tf.data.Dataset):
            make, facts, notice = self._tf(request)
        elif isinstance(self.data, keras.utils.PyDataset):
            make, facts, notice = self._batches(request)
        elif isinstance(self.data, types.GeneratorType | Iterator):
            make, facts, notice = self._generator(request)
        else:
            make, facts, notice = self._arrays(request)
        return make, kinds + facts, notice

    def _arrays(self, request: _Request) -> _Found:
        batch_size, engine = checked_batch_size(request.batch_size, self.engine.size), self.engine
        shuffle = request.shuffled(True)
        source = array_source(
            self.data,
            lambda length: Plan(
                length, batch_size, engine.rank, engine.size, shuffle, request.seed, request.remainder
            ),
        )
        return self._sharded(source, request)

    def _batches(self, request: _Request) -> _Found:
        source = batch_source(
            self.data,
            request.batch_size,
            self.engine.size,
            lambda **found: BatchSource(
                self.data,
                rank=self.engine.rank,
                size=self.engine.size,
                shuffle=request.shuffled(True),
                seed=request.seed,
                remainder=request.remainder,
                **found,
            ),
        )
        for past in range(request.epoch):
            source.begin(past)
            source.end(past)
        return self._sharded(source, request)

    def _sharded(self, source: Any, request: _Request) -> _Found:
        weighted = source if self.class_weight is None else source.weighted(self.class_weight)
        position = _position(request, source.steps)
        return lambda: ShardedDataset(weighted, position), source.facts(), None

    def _tf(self, request: _Request) -> _Found:
        datasets.refuse_to_resume(self.data, request.epoch, request.step)
        own = datasets.own_batch(self.data)
        batch_size = checked_batch_size(
            own if request.batch_size is None else request.batch_size, self.engine.size
        )
        shuffle = False if request.shuffle is None else request.shuffle

        def make() -> datasets.ShardedTFDataset:
            keep = request.remainder == "keep"
            pipeline = datasets.tf_pipeline(self.data, own, batch_size, self.engine, shuffle, keep)
            position = _position(request, pipeline.steps)
            result = datasets.ShardedTFDataset(pipeline, request.seed, position)
            return result if self.class_weight is None else result.weighted(self.class_weight)

        return make, datasets.tf_facts(self.data), None

    def _generator(self, request: _Request) -> _Found:
        batch_size = checked_batch_size(request.batch_size, self.engine.size)
        if request.shuffle or request.epoch or request.step:
            raise ValueError(
                "hvd.shard: a generator can be neither shuffled nor begun in its middle; shuffle, epoch and step "
                "are for arrays, tf.data.Dataset and keras.utils.PyDataset."
            )
        keep, engine = request.remainder == "keep", self.engine
        result = ShardedGenerator(self.data, batch_size, engine.rank, engine.size, keep, self.class_weight)
        return lambda: result, [], _OF_A_GENERATOR


def _position(request: _Request, steps: int | None) -> Position:
    if steps is not None and request.step >= steps:
        raise ValueError(
            f"hvd.shard: step must be one of the {steps} steps of an epoch, 0 to {steps - 1}. Received: "
            f"step={request.step}."
        )
    return Position(request.epoch, request.step)
