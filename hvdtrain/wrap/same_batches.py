"""Give all ranks the same batches: those of rank 0 where batches may differ."""

import types
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain.backends.tensorflow import host_calls
from hvdtrain.collectives.engine import Engine
from hvdtrain.data import structures

# Number of values of each array in its checksum.
_SAMPLES = 1024


def agreed(engine: Engine, arrays: Any) -> Any:
    """Return the arrays if they are equal on all ranks, otherwise those of rank 0.

    Args:
        engine: The ranks.
        arrays: A nested structure of arrays, tensors or data frames, or None.
    """
    if len(set(engine.allgather_object(_checksum(arrays)))) == 1:
        return arrays
    return engine.broadcast_object(keras.tree.map_structure(_portable, arrays))


def of_rank_zero(engine: Engine, batch: Any) -> Any:
    """Return the batch of rank 0 on all ranks, in a graph or eagerly.

    Args:
        engine: The ranks.
        batch: A nested structure of tensors, of the same structure and dtypes on all ranks.
    """
    leaves = tf.nest.flatten(batch, expand_composites=True)
    tensors = [leaf for leaf in leaves if tf.is_tensor(leaf)]

    def send(*arrays: np.ndarray) -> list[Any]:
        return list(engine.broadcast_object(arrays if engine.rank == 0 else None))

    received = iter(host_calls.on_host(engine, send, tensors, [tensor.dtype for tensor in tensors]))
    result = [_with_shape(next(received), leaf) if tf.is_tensor(leaf) else leaf for leaf in leaves]
    return tf.nest.pack_sequence_as(batch, result, expand_composites=True)


def same_everywhere(dataset: Any) -> bool:
    """Return whether a data set certainly yields the same on all ranks, without randomness or Python functions.

    Args:
        dataset: The data passed to `fit`. All ranks shuffle in the same order, because they have the same seeds.
    """
    if not isinstance(dataset, tf.data.Dataset):
        return False
    if getattr(dataset, "_deterministic", None) == "false" or "Generator" in type(dataset).__name__:
        return False
    if any(_is_random(attribute) for attribute in vars(dataset).values()):
        return False
    return all(same_everywhere(source) for source in dataset._inputs())


def _is_random(attribute: Any) -> bool:
    """Return whether an attribute of a data set is a function with a stateful operation."""
    function = getattr(attribute, "function", None)
    graph = getattr(function, "graph", None)
    if graph is None:
        return False
    definition = graph.as_graph_def()
    nodes = list(definition.node)
    for inner in definition.library.function:
        nodes += inner.node_def
    return any(_is_stateful(node.op) for node in nodes)


def _is_stateful(name: str) -> bool:
    from tensorflow.python.framework import op_def_registry

    known = op_def_registry.get(name)
    return known is not None and known.is_stateful and name not in ("Placeholder", "_Arg", "_Retval")


def _with_shape(received: Any, local: Any) -> Any:
    received.set_shape(local.shape)
    return received


def _checksum(arrays: Any) -> int:
    leaves = [_portable(leaf) for leaf in keras.tree.flatten(arrays)]
    return structures.checksum_of_all((leaf for leaf in leaves if leaf is not None), _SAMPLES)


def _portable(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, types.GeneratorType):
        return None
    return np.asarray(leaf)
