"""Where the work is divided: a model that Keras calls on a batch computes each rank's rows on that rank."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import keras
import tensorflow as tf
from keras.src import backend

from hvdtrain.patching import replace
from hvdtrain.wrap import context, layer_losses, row_trial
from hvdtrain.wrap.row_shard import Share
from hvdtrain.wrap.row_trial import Verdict
from hvdtrain.wrap.tensor_attributes import moved

# What was found out about each model, by whether it is training.
_verdicts: WeakKeyDictionary[Any, dict[Any, Verdict]] = WeakKeyDictionary()


def install() -> None:
    """Changes `keras.Model.__call__`, for as long as `context.of_all_ranks` lasts.

    Where Keras only wants to know shapes, or makes variables, nothing is divided.
    """
    replace(keras.Model, "__call__", _divided)
    replace(backend, "compute_output_spec", _on_no_rows)
    replace(keras.Variable, "__init__", _on_no_rows)


def _divided(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = context.engine()
        if engine is None or context.share() is not None or _reads_data():
            return original(self, *args, **kwargs)
        count = _rows((args, kwargs))
        verdict = None if count is None else _verdict(self, engine, original, args, kwargs)
        if verdict is None or verdict.why_whole:
            return original(self, *args, **kwargs)
        share = Share.of(engine, count)
        combine = layer_losses.Joined(share, verdict.losses)
        args, kwargs = keras.tree.map_structure(lambda leaf: row_trial.part(leaf, share), (args, kwargs))
        with context.on_rows(share), context.adding(combine):
            outputs = original(self, *args, **kwargs)
        return keras.tree.map_structure(lambda leaf: _joined(leaf, share, combine), outputs)

    return call


def _reads_data() -> bool:
    """Tells whether a function of a tf.data pipeline is being traced, which runs when it likes."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None and not str(getattr(graph, "name", "")).startswith("Dataset_"):
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


def _rows(arguments: Any) -> Any:
    """Returns the number of rows that all tensors among the arguments have; None if they cannot be divided."""
    leaves = keras.tree.flatten(arguments)
    tensors = [each for each in leaves if row_trial.has_rows(each)]
    if not tensors or any(isinstance(each, keras.KerasTensor) for each in leaves):
        return None
    if any(tf.TensorShape(each.shape).rank is None for each in tensors):
        return None
    known = {each.shape[0] for each in tensors}
    if len(known) != 1:
        return None
    (count,) = known
    return int(count) if count is not None else _common_rows(tensors)


def _common_rows(tensors: list[Any]) -> Any:
    counts = [_row_count(each) for each in tensors]
    checks = [
        tf.debugging.assert_equal(
            each,
            counts[0],
            "hvdtrain run --wrap: a model is called with tensors of different numbers of rows, so its batch cannot "
            "be divided among the ranks. Use hvd.DistributedOptimizer in the script, and hvdtrain run.",
        )
        for each in counts[1:]
    ]
    with tf.control_dependencies([each for each in checks if each is not None]):
        return tf.identity(counts[0])


def _row_count(tensor: Any) -> Any:
    if isinstance(tensor, tf.RaggedTensor):
        return tensor.nrows(tf.int32)
    return (
        tf.cast(tensor.dense_shape[0], tf.int32)
        if isinstance(tensor, tf.SparseTensor)
        else tf.shape(tensor)[0]
    )


def _joined(leaf: Any, share: Share, combine: layer_losses.Joined) -> Any:
    if not tf.is_tensor(leaf):
        return leaf
    return combine(layer_losses.OUTPUT, leaf) if leaf.shape.rank == 0 else moved(leaf, share.join)


def _verdict(model: Any, engine: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Verdict:
    """Return what was found out about a model. Say once if it needs whole batches."""
    verdicts = _verdicts.setdefault(model, {})
    training = kwargs.get("training")
    mode = training if isinstance(training, bool) else None, len(model._flatten_layers())
    if mode not in verdicts:
        reason = _why_whole(model)
        verdict = Verdict(reason) if reason else row_trial.verdict(model, call, args, kwargs)
        said = [each.why_whole for each in verdicts.values()]
        verdicts[mode] = verdict = engine.broadcast_object(verdict)
        if verdict.why_whole and verdict.why_whole not in said:
            engine.say(
                f"the model {model.name} {verdict.why_whole}, so every rank computes whole batches: same result, "
                "no sooner."
            )
    return verdicts[mode]


def _why_whole(model: Any) -> str:
    if any(getattr(each, "stateful", False) for each in model._flatten_layers()):
        return "keeps states from batch to batch"
    # A Sequential model takes the size of the first batch it sees for its input's, and any other too.
    inputs = [] if isinstance(model, keras.Sequential) else getattr(model, "_inputs", None) or []
    return "has a fixed batch size" if any(each.shape[:1] not in ((), (None,)) for each in inputs) else ""


def _on_no_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        with context.on_no_rows():
            return original(*args, **kwargs)

    return make
