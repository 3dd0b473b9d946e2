"""What a `tf.data.Dataset` was made of, as far as it can be told: batches, files, shuffling without a seed."""

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# Names of TensorFlow's own classes for its operations, without the underscore some of them begin with.
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
# What changes elements without joining or splitting them is looked through.
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
    """Returns the name of the operation that made a data set, such as MapDataset."""
    name = type(dataset).__name__.lstrip("_")
    return name.removesuffix("V2").removesuffix("V1")


def chain(dataset: tf.data.Dataset) -> Iterator[tf.data.Dataset]:
    """Yields a data set and all it was made from, the latest operation first."""
    yield dataset
    for each in dataset._inputs():
        yield from chain(each)


def is_batched(dataset: tf.data.Dataset) -> bool:
    """Tells whether elements are batches: by the operations that made them, else by their open first dimension."""
    for each in chain(dataset):
        if kind(each) in _BATCHES:
            return True
        if kind(each) in _SAMPLES:
            return False
        if kind(each) not in _SAME_ROWS:
            break
    shapes = [getattr(spec, "shape", tf.TensorShape(None)) for spec in tf.nest.flatten(dataset.element_spec)]
    return all(shape.rank is not None and shape.rank > 0 and shape[0] is None for shape in shapes)


def batch_size(dataset: tf.data.Dataset) -> int | None:
    """Returns what `.batch()` was given, None where a first batch has to be looked at."""
    for each in chain(dataset):
        if kind(each) in _BATCHES:
            found = getattr(each, "_batch_size", None)
            return None if found is None else tf.get_static_value(found)
    return None


def reads_files(dataset: tf.data.Dataset) -> bool:
    """Tells whether the records come from files, which ranks can divide among themselves."""
    names = {kind(each) for each in chain(dataset)}
    return bool(names & set(_FILES)) or any(_reads_files_inside(each) for each in chain(dataset))


def cache_files(dataset: tf.data.Dataset) -> list[str]:
    """List the files that `.cache(path)` was given."""
    paths = [tf.get_static_value(each._filename) for each in chain(dataset) if kind(each) == "CacheDataset"]
    return [path.decode() for path in paths if path]


def shuffles_without_seed(dataset: tf.data.Dataset) -> bool:
    """Tells whether each process would read the samples in an order of its own."""
    return any(
        kind(each) == "ShuffleDataset" and _number(each._seed) == 0 and _number(each._seed2) == 0
        for each in chain(dataset)
    )


def seeds(dataset: tf.data.Dataset) -> str:
    """Lists the seeds of all shuffling; where they differ between ranks, so does the order."""
    found = [
        (_number(each._seed), _number(each._seed2))
        for each in chain(dataset)
        if kind(each) == "ShuffleDataset"
    ]
    return ", ".join(map(str, found)) or "none"


def reshuffles(dataset: tf.data.Dataset) -> bool:
    """Tells whether the order depends on how often the data set has been read."""
    return any(
        kind(each) == "ShuffleDataset" and getattr(each, "_reshuffle_each_iteration", True) is not False
        for each in chain(dataset)
    )


def in_any_order(dataset: tf.data.Dataset) -> bool:
    """Tells whether an operation was given deterministic=False, where TensorFlow keeps that."""
    return any(getattr(each, "_deterministic", None) == "false" for each in chain(dataset))


def before_shuffling(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns what the first shuffling reads, or the data set itself: what can be looked at without harm."""
    shuffled = [each for each in chain(dataset) if kind(each) == "ShuffleDataset"]
    return shuffled[-1]._inputs()[0] if shuffled else dataset


def only_shuffled(dataset: tf.data.Dataset) -> tf.data.Dataset | None:
    """Returns what a data set draws from at random, None if anything but batching comes between."""
    source = before_shuffling(dataset)
    if source is dataset:
        return None
    for each in chain(dataset):
        if each is source:
            return source
        if kind(each) not in _DRAWN:
            break
    return None


def _reads_files_inside(dataset: tf.data.Dataset) -> bool:
    """Looks into `interleave(tf.data.TFRecordDataset)` and its like, whose files are opened in a function."""
    function = getattr(dataset, "_map_func", None)
    if function is None or not kind(dataset).endswith(("InterleaveDataset", "FlatMapDataset")):
        return False
    graph = function.function.graph.as_graph_def()
    nodes = [*graph.node, *(node for each in graph.library.function for node in each.node_def)]
    return any(node.op.rstrip("V2").endswith(_FILES) for node in nodes)


def _number(value: Any) -> int:
    found = tf.get_static_value(value)
    return int(value if found is None else found)
