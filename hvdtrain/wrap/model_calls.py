"""Divide the work: a model that Keras calls on a batch computes on each rank the rows of that rank."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import keras
import tensorflow as tf
from keras.src import backend

from hvdtrain.collectives.engine import Engine
from hvdtrain.patching import replace
from hvdtrain.wrap import row_trial
from hvdtrain.wrap.layers import OUTPUT, combiner
from hvdtrain.wrap.row_shard import Combine, Share, alone, current, has_rows, moved, part, running
from hvdtrain.wrap.row_trial import Verdict

# For each model its verdicts, by training mode and number of layers.
_verdicts: WeakKeyDictionary[Any, dict[Any, Verdict]] = WeakKeyDictionary()


def install() -> None:
    """Change `keras.Model.__call__`, for the time in which all ranks run a step together.

    Where Keras only computes shapes or creates variables, nothing is divided.
    """
    replace(keras.Model, "__call__", _divided)
    replace(backend, "compute_output_spec", _on_no_rows)
    replace(keras.Variable, "__init__", _on_no_rows)


def _divided(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = current().engine
        if engine is None or current().share is not None or _in_data_pipeline():
            return original(self, *args, **kwargs)
        count = _rows((args, kwargs))
        verdict = None if count is None else _verdict(self, engine, original, args, kwargs)
        if verdict is None or verdict.why_whole:
            return original(self, *args, **kwargs)
        share = Share.of(engine, count)
        combine = combiner(share, verdict.losses)
        args, kwargs = keras.tree.map_structure(lambda leaf: part(leaf, share), (args, kwargs))
        with running(share=share, combine=combine):
            outputs = original(self, *args, **kwargs)
        return keras.tree.map_structure(lambda leaf: _joined(leaf, share, combine), outputs)

    return call


def _in_data_pipeline() -> bool:
    """Return whether TensorFlow traces a function of a tf.data pipeline, which may run at any time."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None and not str(getattr(graph, "name", "")).startswith("Dataset_"):
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


def _rows(arguments: Any) -> Any:
    """Return the common number of rows of all tensors in the arguments, None if they cannot be divided."""
    leaves = keras.tree.flatten(arguments)
    tensors = [leaf for leaf in leaves if has_rows(leaf)]
    if not tensors or any(isinstance(leaf, keras.KerasTensor) for leaf in leaves):
        return None
    if any(tf.TensorShape(tensor.shape).rank is None for tensor in tensors):
        return None
    known = {tensor.shape[0] for tensor in tensors}
    if len(known) != 1:
        return None
    (count,) = known
    return int(count) if count is not None else _common_rows(tensors)


def _common_rows(tensors: list[Any]) -> Any:
    counts = [_row_count(tensor) for tensor in tensors]
    message = (
        "hvdtrain run --wrap: a model is called with tensors of different numbers of rows, so its batch cannot "
        "be divided among the ranks. Use hvd.DistributedOptimizer in the script, and hvdtrain run."
    )
    checks = [tf.debugging.assert_equal(count, counts[0], message) for count in counts[1:]]
    with tf.control_dependencies([check for check in checks if check is not None]):
        return tf.identity(counts[0])


def _row_count(tensor: Any) -> Any:
    if isinstance(tensor, tf.RaggedTensor):
        return tensor.nrows(tf.int32)
    if isinstance(tensor, tf.SparseTensor):
        return tf.cast(tensor.dense_shape[0], tf.int32)
    return tf.shape(tensor)[0]


def _joined(leaf: Any, share: Share, combine: Combine) -> Any:
    if not tf.is_tensor(leaf):
        return leaf
    return combine(OUTPUT, leaf) if leaf.shape.rank == 0 else moved(leaf, share.join)


def _verdict(model: Any, engine: Engine, call: Callable[..., Any], args: Any, kwargs: Any) -> Verdict:
    """Return the verdict on a model; print once if it needs whole batches."""
    verdicts = _verdicts.setdefault(model, {})
    training = kwargs.get("training")
    mode = training if isinstance(training, bool) else None, len(model._flatten_layers())
    if mode not in verdicts:
        reason = _why_whole(model)
        verdict = Verdict(reason) if reason else row_trial.verdict(model, call, args, kwargs)
        printed = [earlier.why_whole for earlier in verdicts.values()]
        verdicts[mode] = verdict = engine.broadcast_object(verdict)
        if verdict.why_whole and verdict.why_whole not in printed:
            engine.say(
                f"the model {model.name} {verdict.why_whole}, so every rank computes whole batches: same result, "
                "not faster."
            )
    return verdicts[mode]


def _why_whole(model: Any) -> str:
    if any(getattr(layer, "stateful", False) for layer in model._flatten_layers()):
        return "keeps states from batch to batch"
    # A Sequential model stores the size of its first batch in its input, but accepts other sizes too.
    inputs = [] if isinstance(model, keras.Sequential) else getattr(model, "_inputs", None) or []
    if any(tensor.shape[:1] not in ((), (None,)) for tensor in inputs):
        return "has a fixed batch size"
    return ""


def _on_no_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        with alone():
            return original(*args, **kwargs)

    return make
