"""Give all ranks the same batches: those of rank 0 where batches may differ."""

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers import data_adapters
from tensorflow.python.framework import op_def_registry

from hvdtrain.backends.tensorflow import host_calls
from hvdtrain.collectives.engine import Engine
from hvdtrain.data import dataset_graph, structures
from hvdtrain.patching import replace
from hvdtrain.wrap.row_shard import current

# Number of values of each array in its checksum.
_SAMPLES = 1024
# For each method of a model the steps for which Keras reads data, in order; the last one may read several times.
_READING_STEPS = {
    "fit": ["train_step", "test_step"],
    "evaluate": ["test_step"],
    "predict": ["predict_step"],
}

# For each model the steps that first receive the batch of rank 0.
_receiving: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


@dataclass
class _Reader:
    """A model that reads data: the steps that will read, and a factor of the size of training batches."""

    model: Any
    steps: list[str]
    scale: int

    def next_step(self) -> str | None:
        return self.steps.pop(0) if len(self.steps) > 1 else next(iter(self.steps), None)


_reader: ContextVar[_Reader | None] = ContextVar("the model that reads", default=None)


def install(engine: Engine) -> None:
    """Change how Keras chooses a data adapter."""
    replace(data_adapters, "get_data_adapter", lambda choose: _with_equal_batches(engine, choose))


@contextlib.contextmanager
def read_by(model: Any, method: str, scale: int) -> Iterator[None]:
    """Give a model the same batches on all ranks during this context.

    Args:
        model: The model.
        method: The name of its method that reads data.
        scale: Factor of the size of training batches.
    """
    for name in ("train_step", "test_step", "predict_step"):
        step = getattr(model, name)
        if not hasattr(step, "hvdtrain_wrapped"):
            # Set on the instance, because scripts override the method in their classes.
            vars(model)[name] = _with_received_batch(model, name, step)
    token = _reader.set(_Reader(model, list(_READING_STEPS.get(method, [])), scale))
    try:
        yield
    finally:
        _reader.reset(token)


def agreed(engine: Engine, arrays: Any) -> Any:
    """Return the arrays if they are equal on all ranks, otherwise those of rank 0.

    Args:
        engine: The ranks.
        arrays: A nested structure of arrays, tensors or data frames, or None.
    """
    leaves = [_portable(leaf) for leaf in keras.tree.flatten(arrays)]
    checksum = structures.checksum_of_all((leaf for leaf in leaves if leaf is not None), _SAMPLES)
    if len(set(engine.allgather_object(checksum))) == 1:
        return arrays
    return engine.broadcast_object(keras.tree.map_structure(_portable, arrays))


def _portable(leaf: Any) -> Any:
    return None if leaf is None or isinstance(leaf, types.GeneratorType) else np.asarray(leaf)


def _with_received_batch(model: Any, name: str, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(batch: Any) -> Any:
        engine = current().engine
        if engine is not None and name in _receiving.get(model, ()):
            batch = _of_rank_zero(engine, batch)
        return step(batch)

    run.hvdtrain_wrapped = True  # type: ignore[attr-defined]
    return run


def _of_rank_zero(engine: Engine, batch: Any) -> Any:
    """Return the batch of rank 0; the ranks' batches need only have the same structure and dtypes."""
    leaves = tf.nest.flatten(batch, expand_composites=True)
    tensors = [leaf for leaf in leaves if tf.is_tensor(leaf)]

    def send(*arrays: np.ndarray) -> list[Any]:
        return list(engine.broadcast_object(arrays if engine.rank == 0 else None))

    received = iter(host_calls.on_host(engine, send, tensors, [tensor.dtype for tensor in tensors]))
    for index, leaf in enumerate(leaves):
        if tf.is_tensor(leaf):
            leaves[index] = next(received)
            leaves[index].set_shape(leaf.shape)
    return tf.nest.pack_sequence_as(batch, leaves, expand_composites=True)


def _with_equal_batches(engine: Engine, choose: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(choose)

    def get_data_adapter(*args: Any, **kwargs: Any) -> Any:
        reader = _reader.get()
        if reader is None:
            return choose(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        step = reader.next_step()
        arrays = {name: given.get(name) for name in structures.NAMES}
        if data_adapters.array_data_adapter.can_convert_arrays(tuple(arrays.values())):
            given.update(agreed(engine, arrays))
        elif step is not None and not _same_everywhere(given["x"]):
            _receive_batches(reader.model, step)
        adapter = choose(**given)
        if step == "train_step" and reader.scale > 1:
            return _with_larger_batches(adapter, reader.scale)
        return adapter

    return get_data_adapter


def _receive_batches(model: Any, step: str) -> None:
    """Let a step first receive the batch of rank 0 from now on; Keras must trace its function again."""
    steps = _receiving.setdefault(model, set())
    if step not in steps:
        steps.add(step)
        setattr(model, step.replace("_step", "_function"), None)


def _same_everywhere(dataset: Any) -> bool:
    """Return whether a data set certainly yields the same on all ranks, without randomness or Python functions.

    All ranks shuffle in the same order, because they have the same seeds.
    """
    if not isinstance(dataset, tf.data.Dataset) or dataset_graph.in_any_order(dataset):
        return False
    for stage in dataset_graph.chain(dataset):
        if "Generator" in type(stage).__name__ or any(_is_random(value) for value in vars(stage).values()):
            return False
    return True


def _is_random(attribute: Any) -> bool:
    """Return whether an attribute of a data set is a function with a stateful operation."""
    graph = getattr(getattr(attribute, "function", None), "graph", None)
    if graph is None:
        return False
    definition = graph.as_graph_def()
    nodes = list(definition.node)
    for inner in definition.library.function:
        nodes += inner.node_def
    for node in nodes:
        known = op_def_registry.get(node.op)
        if known is not None and known.is_stateful and node.op not in ("Placeholder", "_Arg", "_Retval"):
            return True
    return False


def _with_larger_batches(adapter: Any, factor: int) -> Any:
    """Join several batches of the script into one."""
    dataset, count = adapter.get_tf_dataset(), adapter.num_batches
    adapter.__class__ = type(
        "Larger" + type(adapter).__name__,
        (type(adapter),),
        {
            "num_batches": property(lambda self: None if count is None else -(-count // factor)),
            "get_tf_dataset": lambda self: dataset.ragged_batch(factor).map(_concatenated),
        },
    )
    return adapter


def _concatenated(*batches: Any) -> Any:
    """Concatenate the batches that `ragged_batch` has stacked."""

    def merged(stack: Any) -> Any:
        if isinstance(stack, tf.RaggedTensor):
            return stack.merge_dims(0, 1)
        return tf.reshape(stack, tf.concat([[-1], tf.shape(stack)[2:]], 0))

    joined = tf.nest.map_structure(merged, batches)
    return joined if len(joined) > 1 else joined[0]
