"""Print a note if `fit`, `evaluate` or `predict` of sharded data does not compute what a script probably expects.

Keras: `Model.fit`, `Model.evaluate` and `Model.predict` use the data of this process only.

On several ranks: `evaluate` and `predict` of data from `hvd.shard` return the result of one rank's part,
`fit` with an optimizer that is not distributed trains a different model on each rank, and the weights that
`hvd.shard` adds to samples scale the displayed loss if the script changes the data further.

Replacement: the three methods print each note once, on rank 0, and then do the same as Keras.
"""

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
from hvdtrain.keras.membership import optimizers_of
from hvdtrain.keras.optimizer.distributed import is_distributed
from hvdtrain.keras.patches.sharded_data import is_of_all_ranks
from hvdtrain.patching import replace_where_defined

_PARTIAL_RESULTS = {
    "evaluate": (
        "model.evaluate measures only each rank's part of the data that hvd.shard returned. "
        "hvd.evaluate(model, data) measures the whole data, on all ranks together."
    ),
    "predict": (
        "model.predict predicts only each rank's part of the data that hvd.shard returned, in its own order. "
        "hvd.predict(model, data), with the data before hvd.shard, predicts all samples, in their order."
    ),
}
_NOT_DISTRIBUTED = (
    "this model's optimizer, {name}, is not distributed: each rank trains its own model on its part of the data "
    "that hvd.shard returned. Type: model.compile(hvd.DistributedOptimizer(model.optimizer), …)."
)
_DERIVED_DATA = (
    "this data was derived from data that hvd.shard returned, by .map, .prefetch or a similar method. Its samples "
    "have weights, which scale the displayed loss of a last batch that is not full. Call hvd.shard last, or with "
    "remainder='drop'. Training is correct."
)
_printed: set[str] = set()


@functools.cache
def install() -> None:
    """Replace `Model.evaluate` and `Model.predict`. A second call has no effect."""
    for name in ("evaluate", "predict"):
        replace_where_defined(keras.Model, name, printing_notes)


def printing_notes(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fit`, `evaluate` or `predict` that prints its notes first; `model_fit.py` uses it for `fit`."""
    signature = inspect.signature(method)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if runtime.is_initialized() and runtime.engine().size > 1:
            given = signature.bind(self, *args, **kwargs).arguments
            for note in _notes(self, given, method.__name__):
                if note not in _printed:
                    _printed.add(note)
                    runtime.engine().say(note)
        return method(self, *args, **kwargs)

    return run


def _notes(model: Any, given: dict[str, Any], name: str) -> Iterator[str]:
    x = given.get("x")
    sharded = isinstance(x, Sharded)
    if name in _PARTIAL_RESULTS and sharded and not is_of_all_ranks(given.get("callbacks")):
        yield _PARTIAL_RESULTS[name]
    if name == "predict":
        return
    sources = dataset_graph.chain(x) if isinstance(x, tf.data.Dataset) and not sharded else ()
    if any(isinstance(source, ShardedTFDataset) and source.partial for source in sources):
        yield _DERIVED_DATA
    own_step = type(model).train_step is not keras.Model.train_step  # it may reduce gradients itself
    together = own_step or is_of_all_ranks(given.get("callbacks"))
    if name == "fit" and sharded and not together and _averages_nothing(model):
        registry.together = True  # a script that divides data among ranks should train one model
        yield _NOT_DISTRIBUTED.format(name=type(model.optimizer).__name__)


def _averages_nothing(model: Any) -> bool:
    """Return whether a model is compiled, and none of its optimizers is distributed."""
    optimizers = optimizers_of(model)
    return bool(optimizers) and not any(is_distributed(optimizer) for optimizer in optimizers)
