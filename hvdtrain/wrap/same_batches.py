"""All ranks hold the same batches: where that is not certain, rank 0's are the truth."""

import types
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain.backends.tensorflow import host_calls
from hvdtrain.collectives.engine import Engine
from hvdtrain.data import structures

_SAMPLES = 1024


def agreed(engine: Engine, arrays: Any) -> Any:
    """Returns arrays that are the same on all ranks: these, if they are, else rank 0's.

    Args:
        engine: The ranks.
        arrays: A nest of arrays, tensors or data frames, or None.
    """
    if len(set(engine.allgather_object(_checksum(arrays)))) == 1:
        return arrays
    return engine.broadcast_object(keras.tree.map_structure(_portable, arrays))


def of_rank_zero(engine: Engine, batch: Any) -> Any:
    """Returns rank 0's batch on all ranks, in a graph or eagerly.

    Args:
        engine: The ranks.
        batch: A nest of tensors, of the same structure and dtypes on all ranks.
    """
    leaves = tf.nest.flatten(batch, expand_composites=True)
    mine = [each for each in leaves if tf.is_tensor(each)]

    def send(*arrays: np.ndarray) -> list[Any]:
        return list(engine.broadcast_object(arrays if engine.rank == 0 else None))

    received = iter(host_calls.on_host(engine, send, mine, [each.dtype for each in mine]))
    whole = [_shaped(next(received), each) if tf.is_tensor(each) else each for each in leaves]
    return tf.nest.pack_sequence_as(batch, whole, expand_composites=True)


def same_everywhere(dataset: Any) -> bool:
    """Tells whether a data set is sure to yield the same on all ranks, without chance or calls of Python.

    Args:
        dataset: What `fit` was given. Ranks shuffle alike, because they have the same seeds.
    """
    if not isinstance(dataset, tf.data.Dataset):
        return False
    if getattr(dataset, "_deterministic", None) == "false" or "Generator" in type(dataset).__name__:
        return False
    return not any(map(_by_chance, vars(dataset).values())) and all(map(same_everywhere, dataset._inputs()))


def _by_chance(part: Any) -> bool:
    function = getattr(part, "function", None)
    graph = getattr(function, "graph", None)
    if graph is None:
        return False
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for each in definition.library.function for node in each.node_def)]
    return any(_is_stateful(node.op) for node in nodes)


def _is_stateful(name: str) -> bool:
    from tensorflow.python.framework import op_def_registry

    known = op_def_registry.get(name)
    return known is not None and known.is_stateful and name not in ("Placeholder", "_Arg", "_Retval")


def _shaped(received: Any, local: Any) -> Any:
    received.set_shape(local.shape)
    return received


def _checksum(arrays: Any) -> int:
    leaves = [_portable(leaf) for leaf in keras.tree.flatten(arrays)]
    return structures.checksum_of_all((each for each in leaves if each is not None), _SAMPLES)


def _portable(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, int | float | str | np.ndarray):
        return None if leaf is None else np.asarray(leaf)
    if isinstance(leaf, types.GeneratorType):
        return None
    return np.asarray(leaf)


Step = Callable[[Any], Any]


def shared_step(engine: Engine, step: Step) -> Step:
    """Makes a step of training or evaluation begin with rank 0's batch."""

    def run(data: Any) -> Any:
        return step(of_rank_zero(engine, data))

    return run
