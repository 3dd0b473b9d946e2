"""Inspect the operations that made a `tf.data.Dataset`: batching, files, caches, shuffling."""

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# Names of TensorFlow's classes for its operations, without the leading underscore that some have.
_BATCHES = (
    *("BatchDataset", "ParallelBatchDataset", "PaddedBatchDataset", "DenseToRaggedDataset", "RebatchDataset"),
    "TensorDataset",
)
_SAMPLES = ("UnbatchDataset", "TensorSliceDataset", "RangeDataset")
_DRAWN = (
    *("BatchDataset", "ParallelBatchDataset", "PrefetchDataset", "ShuffleDataset", "OptionsDataset"),
    "CacheDataset",
)
_FILES = ("TextLineDataset", "TFRecordDataset", "FixedLengthRecordDataset", "CsvDataset")
# Operations that neither join nor split elements, so that the operation before them decides.
_SAME_ROWS = (
    *("MapDataset", "ParallelMapDataset", "PrefetchDataset", "CacheDataset", "ShuffleDataset", "TakeDataset"),
    *(
        "SkipDataset",
        "RepeatDataset",
        "OptionsDataset",
        "FilterDataset",
        "ShardDataset",
        "ConcatenateDataset",
    ),
    *("AssertCardinalityDataset", "IgnoreErrorsDataset", "ZipDataset", "SnapshotDataset", "TakeWhileDataset"),
)


def kind(dataset: tf.data.Dataset) -> str:
    """Return the name of the operation that made a data set, such as MapDataset."""
    name = type(dataset).__name__.lstrip("_")
    return name.removesuffix("V2").removesuffix("V1")


def chain(dataset: tf.data.Dataset) -> Iterator[tf.data.Dataset]:
    """Yield a data set and all data sets that it was made from, the last operation first."""
    yield dataset
    for source in dataset._inputs():
        yield from chain(source)


def is_batched(dataset: tf.data.Dataset) -> bool:
    """Return whether elements are batches, judged by the operations, else by an unknown first dimension."""
    for stage in chain(dataset):
        if kind(stage) in _BATCHES:
            return True
        if kind(stage) in _SAMPLES:
            return False
        if kind(stage) not in _SAME_ROWS:
            break
    shapes = [getattr(spec, "shape", tf.TensorShape(None)) for spec in tf.nest.flatten(dataset.element_spec)]
    return all(shape.rank is not None and shape.rank > 0 and shape[0] is None for shape in shapes)


def batch_size(dataset: tf.data.Dataset) -> int | None:
    """Return the argument of `.batch()`, or None if only reading a first batch can tell."""
    for stage in chain(dataset):
        if kind(stage) in _BATCHES:
            found = getattr(stage, "_batch_size", None)
            return None if found is None else tf.get_static_value(found)
    return None


def reads_files(dataset: tf.data.Dataset) -> bool:
    """Return whether the records come from files, which ranks can divide among themselves."""
    names = {kind(stage) for stage in chain(dataset)}
    return bool(names & set(_FILES)) or any(_reads_files_inside(stage) for stage in chain(dataset))


def cache_files(dataset: tf.data.Dataset) -> list[str]:
    """List the files that `.cache(path)` was given."""
    paths = [
        tf.get_static_value(stage._filename) for stage in chain(dataset) if kind(stage) == "CacheDataset"
    ]
    return [path.decode() for path in paths if path]


def shuffles_without_seed(dataset: tf.data.Dataset) -> bool:
    """Return whether each process would read the samples in a different order."""
    return any(
        kind(stage) == "ShuffleDataset" and _number(stage._seed) == 0 and _number(stage._seed2) == 0
        for stage in chain(dataset)
    )


def seeds(dataset: tf.data.Dataset) -> str:
    """List the seeds of all shuffling; where they differ between ranks, so does the order."""
    found = [
        (_number(stage._seed), _number(stage._seed2))
        for stage in chain(dataset)
        if kind(stage) == "ShuffleDataset"
    ]
    return ", ".join(map(str, found)) or "none"


def reshuffles(dataset: tf.data.Dataset) -> bool:
    """Return whether the order depends on how often the data set has been read."""
    return any(
        kind(stage) == "ShuffleDataset" and getattr(stage, "_reshuffle_each_iteration", True) is not False
        for stage in chain(dataset)
    )


def in_any_order(dataset: tf.data.Dataset) -> bool:
    """Return whether an operation was given deterministic=False, as far as TensorFlow records that."""
    return any(getattr(stage, "_deterministic", None) == "false" for stage in chain(dataset))


def before_shuffling(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Return the input of the first shuffling, or the data set itself; reading it changes no later order."""
    shuffled = [stage for stage in chain(dataset) if kind(stage) == "ShuffleDataset"]
    return shuffled[-1]._inputs()[0] if shuffled else dataset


def only_shuffled(dataset: tf.data.Dataset) -> tf.data.Dataset | None:
    """Return the input of the shuffling, or None if anything but batching follows or nothing is shuffled."""
    source = before_shuffling(dataset)
    if source is dataset:
        return None
    for stage in chain(dataset):
        if stage is source:
            return source
        if kind(stage) not in _DRAWN:
            break
    return None


def _reads_files_inside(dataset: tf.data.Dataset) -> bool:
    """Return whether the function of an `interleave` or `flat_map` opens files."""
    function = getattr(dataset, "_map_func", None)
    if function is None or not kind(dataset).endswith(("InterleaveDataset", "FlatMapDataset")):
        return False
    graph = function.function.graph.as_graph_def()
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    return any(node.op.rstrip("V2").endswith(_FILES) for node in nodes)


def _number(value: Any) -> int:
    found = tf.get_static_value(value)
    return int(value if found is None else found)
