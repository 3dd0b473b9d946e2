"""Says once where Keras' `fit`, `evaluate` and `predict` of sharded data do not do what it was divided for."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.data import dataset_graph
from hvdtrain.data.datasets import ShardedTFDataset
from hvdtrain.data.shard import Sharded
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.keras.callbacks.membership import optimizers_of
from hvdtrain.keras.optimizer.distributed import is_distributed
from hvdtrain.keras.patches.sharded_data import is_of_all_ranks
from hvdtrain.patching import replace_where_defined

_SENTENCES = {
    "evaluate": (
        "model.evaluate with what hvd.shard returned measures each rank's part. hvd.evaluate(model, data) "
        "measures the whole, on all ranks together."
    ),
    "predict": (
        "model.predict with what hvd.shard returned predicts each rank's part, in its own order. "
        "hvd.predict(model, data), with the data as they were before hvd.shard, predicts all, in order."
    ),
}
_ALONE = (
    "this model's optimizer, {name}, is not distributed: each rank trains a model of its own on its part of what "
    "hvd.shard returned. Type: model.compile(hvd.DistributedOptimizer(model.optimizer), …)."
)
_MADE_OF_IT = (
    "this data was made of what hvd.shard returned, by .map, .prefetch or the like: its samples come with weights, "
    "by which the loss of a last batch that is not full is scaled on each rank. Call hvd.shard last, or with "
    "remainder='drop'. What is learned is right."
)
_installed = False
_said: set[str] = set()


def install() -> None:
    """Make `fit`, `evaluate` and `predict` speak; once is enough."""
    global _installed
    if _installed:
        return
    _installed = True
    for name in ("fit", "evaluate", "predict"):
        replace_where_defined(keras.Model, name, functools.partial(_speaking, name))


def _speaking(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if runtime.is_initialized() and runtime.engine().size > 1:
            given = signature.bind(self, *args, **kwargs).arguments
            for sentence in _sentences(self, given, name):
                if sentence not in _said:
                    _said.add(sentence)
                    runtime.engine().say(sentence)
        return method(self, *args, **kwargs)

    return run


def _sentences(model: Any, given: dict[str, Any], name: str) -> Iterator[str]:
    x = given.get("x")
    sharded = isinstance(x, Sharded)
    if name in _SENTENCES and sharded and not is_of_all_ranks(given.get("callbacks")):
        yield _SENTENCES[name]
    if name == "predict":
        return
    made_of = dataset_graph.chain(x) if isinstance(x, tf.data.Dataset) and not sharded else ()
    if any(isinstance(each, ShardedTFDataset) and each.partial for each in made_of):
        yield _MADE_OF_IT
    own_step = type(model).train_step is not keras.Model.train_step  # which may reduce gradients itself
    together = own_step or is_of_all_ranks(given.get("callbacks"))
    if name == "fit" and sharded and not together and _plain(model):
        registry.together = True  # a script that divides data among the ranks trains one model
        yield _ALONE.format(name=type(model.optimizer).__name__)


def _plain(model: Any) -> bool:
    """Return whether a model is compiled, and with optimizers of which none is distributed."""
    optimizers = optimizers_of(model)
    return bool(optimizers) and not any(is_distributed(each) for each in optimizers)
