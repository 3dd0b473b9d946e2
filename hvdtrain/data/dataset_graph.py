"""Inspect the operations that made a `tf.data.Dataset`, and reject those whose results ranks cannot share."""

import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from hvdtrain.collectives.engine import Engine, ranks_text

# Names of TensorFlow's classes for its operations, as `_kind` returns them.
_BATCHES = ("Batch", "ParallelBatch", "PaddedBatch", "DenseToRagged", "Rebatch", "Tensor")
_SAMPLES = ("Unbatch", "TensorSlice", "Range")
_DRAWN = ("Batch", "ParallelBatch", "Prefetch", "Shuffle", "Options", "Cache")
_FILES = ("TextLine", "TFRecord", "FixedLengthRecord", "Csv")
# Operations that neither join nor split elements, so that the operation before them decides.
_SAME_ROWS = (
    *("Map", "ParallelMap", "Prefetch", "Cache", "Shuffle", "Take", "Skip", "Repeat", "Options", "Filter"),
    *("Shard", "Concatenate", "AssertCardinality", "IgnoreErrors", "Zip", "Snapshot", "TakeWhile"),
)


def chain(dataset: tf.data.Dataset) -> Iterator[tf.data.Dataset]:
    """Yield a data set and all data sets that it was made from, the last operation first."""
    yield dataset
    for source in dataset._inputs():
        yield from chain(source)


def is_batched(dataset: tf.data.Dataset) -> bool:
    """Return whether elements are batches, judged by the operations, else by an unknown first dimension."""
    for stage in chain(dataset):
        if _kind(stage) in _BATCHES:
            return True
        if _kind(stage) in _SAMPLES:
            return False
        if _kind(stage) not in _SAME_ROWS:
            break
    shapes = [getattr(spec, "shape", tf.TensorShape(None)) for spec in tf.nest.flatten(dataset.element_spec)]
    return all(shape.rank is not None and shape.rank > 0 and shape[0] is None for shape in shapes)


def batch_size(dataset: tf.data.Dataset) -> int | None:
    """Return the argument of `.batch()`, or None if only reading a first batch can tell."""
    batching = next((stage for stage in chain(dataset) if _kind(stage) in _BATCHES), None)
    found = getattr(batching, "_batch_size", None)
    return None if found is None else tf.get_static_value(found)


def reads_files(dataset: tf.data.Dataset) -> bool:
    """Return whether the records come from files, which ranks can divide among themselves."""
    return any(_kind(stage) in _FILES or _reads_files_inside(stage) for stage in chain(dataset))


def shuffles_without_seed(dataset: tf.data.Dataset) -> bool:
    """Return whether each process would read the samples in a different order."""
    return (0, 0) in _seeds(dataset)


def seeds(dataset: tf.data.Dataset) -> str:
    """List the seeds of all shuffling; where they differ between ranks, so does the order."""
    return ", ".join(map(str, _seeds(dataset))) or "none"


def reshuffles(dataset: tf.data.Dataset) -> bool:
    """Return whether the order depends on how often the data set has been read."""
    return any(getattr(stage, "_reshuffle_each_iteration", True) is not False for stage in _shuffles(dataset))


def in_any_order(dataset: tf.data.Dataset) -> bool:
    """Return whether an operation was given deterministic=False, as far as TensorFlow records that."""
    return any(getattr(stage, "_deterministic", None) == "false" for stage in chain(dataset))


def before_shuffling(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Return the input of the first shuffling, or the data set itself; reading it changes no later order."""
    shuffled = _shuffles(dataset)
    return shuffled[-1]._inputs()[0] if shuffled else dataset


def only_shuffled(dataset: tf.data.Dataset) -> tf.data.Dataset | None:
    """Return the input of the shuffling, or None if anything but batching follows or nothing is shuffled."""
    source = before_shuffling(dataset)
    if source is dataset:
        return None
    for stage in chain(dataset):
        if stage is source:
            return source
        if _kind(stage) not in _DRAWN:
            break
    return None


def cache_files(data: Any, whole: bool = False) -> list[str]:
    """List the files of `.cache(path)` that no other rank may use.

    Args:
        data: The training data; only a `tf.data.Dataset` has cache files.
        whole: Whether every rank reads the same data, so that a complete file is correct for all.
    """
    if not isinstance(data, tf.data.Dataset):
        return []
    named = [tf.get_static_value(stage._filename) for stage in chain(data) if _kind(stage) == "Cache"]
    paths = [str(Path(name.decode()).absolute()) for name in named if name]
    return [path for path in paths if not (whole and Path(f"{path}.index").exists())]


def refuse_common_caches(engine: Engine, what: str, files: Sequence[str]) -> None:
    """Raise an error if several ranks of a host cache their data in the same file. All ranks call this.

    TensorFlow fails if two processes write one file. If the file is complete, every process reads it without an
    error, even when it holds another rank's part.

    Args:
        what: The first words of the error message.
        files: The result of `cache_files` on this rank.

    Raises:
        ValueError: On every rank.
    """
    users = defaultdict(list)
    everywhere = engine.allgather_object((socket.gethostname(), list(files)))
    for rank, (host, paths) in zip(engine.ranks, everywhere, strict=True):
        for path in paths:
            users[host, path].append(rank)
    for (_, path), ranks in users.items():
        if len(ranks) > 1:
            raise ValueError(
                f"{what}: {ranks_text(ranks)} cache their data in the same file, {path}. Each rank needs a file of "
                f"its own: dataset.cache(f'{path}-{{hvd.rank()}}'); or leave the path out, to cache in memory."
            )


def refuse_other_orders(dataset: tf.data.Dataset, engine: Engine) -> None:
    """Raise ValueError unless all ranks read the same sequence, of which each takes its part."""
    if engine.size == 1:
        return
    order = "deterministic=False" if in_any_order(dataset) else f"shuffle seeds {seeds(dataset)}"
    orders = engine.allgather_object(order)
    if shuffles_without_seed(dataset) or len(set(orders)) > 1 or "deterministic=False" in orders:
        listed = "\n".join(f"  rank {rank}: {order}" for rank, order in enumerate(orders))
        raise ValueError(
            f"hvd.shard: each rank would read this data set in its own order (0 is no seed).\n{listed}\n"
            "Each takes its part of the same sequence, so samples would be missed and others seen twice. Leave "
            "shuffling to hvd.shard(…, shuffle=True); or call keras.utils.set_random_seed(0), the same number "
            "on all ranks, before you make the data set, and leave out deterministic=False."
        )


def _kind(dataset: tf.data.Dataset) -> str:
    """Return the name of the operation that made a data set, such as Map for `_MapDatasetV2`."""
    name = type(dataset).__name__.lstrip("_")
    return name.removesuffix("V2").removesuffix("V1").removesuffix("Dataset")


def _shuffles(dataset: tf.data.Dataset) -> list[tf.data.Dataset]:
    return [stage for stage in chain(dataset) if _kind(stage) == "Shuffle"]


def _seeds(dataset: tf.data.Dataset) -> list[tuple[int, int]]:
    return [(_number(stage._seed), _number(stage._seed2)) for stage in _shuffles(dataset)]


def _number(value: Any) -> int:
    found = tf.get_static_value(value)
    return int(value if found is None else found)


def _reads_files_inside(dataset: tf.data.Dataset) -> bool:
    """Return whether the function of an `interleave` or `flat_map` opens files."""
    function = getattr(dataset, "_map_func", None)
    if function is None or not _kind(dataset).endswith(("Interleave", "FlatMap")):
        return False
    graph = function.function.graph.as_graph_def()
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    return any(node.op.removesuffix("V2").removesuffix("Dataset").endswith(_FILES) for node in nodes)
