"""Average gradients over the ranks in each optimizer used inside `fit`; reject an update outside of `fit`."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdtrain.keras.optimizer.distributed import DistributedOptimizer, is_distributed
from hvdtrain.patching import replace_where_defined
from hvdtrain.wrap import context

_CUSTOM_LOOP = (
    "hvdtrain run --wrap: {name}.apply is called outside of model.fit and model.train_on_batch. A script with a "
    "custom training loop must divide its work among the ranks itself: import hvdtrain.keras as hvd, call "
    "hvd.init(), make the optimizer hvd.DistributedOptimizer({name}(...)), give each rank its part of the data "
    "with hvd.shard, and start it with hvdtrain run without --wrap. Nothing was updated."
)


def install() -> None:
    """Change `apply` in the base class of all Keras optimizers."""
    replace_where_defined(keras.optimizers.Optimizer, "apply", _on_all_ranks)


def _on_all_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        if context.engine() is None:
            raise RuntimeError(_CUSTOM_LOOP.format(name=type(self).__name__))
        distribute(self)
        return original(self, grads, trainable_variables)

    return apply


def distribute(optimizer: Any) -> None:
    """Make an optimizer average over the ranks from now on. The object and its state stay the same.

    Args:
        optimizer: A Keras optimizer. Of a `LossScaleOptimizer` the inner optimizer is changed.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if not is_distributed(inner):
        with tf.init_scope():  # TensorFlow may be tracing a graph
            inner.__class__ = type(DistributedOptimizer(inner))


def of_model(model: Any) -> list[Any]:
    """List the optimizers that are attributes of a model, alone or in a list, tuple or dictionary."""
    found = {}
    for attribute in vars(model).values():
        values = [attribute]
        if isinstance(attribute, dict):
            values = list(attribute.values())
        elif isinstance(attribute, list | tuple):
            values = list(attribute)
        for value in values:
            if isinstance(value, keras.optimizers.Optimizer):
                found[id(value)] = value
    return list(found.values())
