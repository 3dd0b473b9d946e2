"""Every optimizer that updates inside `fit` averages over the ranks; one that updates elsewhere is refused."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdtrain.keras.optimizer.distributed import DistributedOptimizer, is_distributed
from hvdtrain.patching import replace_where_defined
from hvdtrain.wrap import context

LOOP = (
    "hvdtrain run --wrap: {name}.apply is called outside of model.fit and model.train_on_batch. In a training "
    "loop of its own a script has to say what is divided among the ranks: import hvdtrain.keras as hvd, call "
    "hvd.init(), make the optimizer hvd.DistributedOptimizer({name}(...)), give each rank its part of the data "
    "with hvd.shard, and start it with hvdtrain run without --wrap. Nothing was updated."
)


def install() -> None:
    """Changes `apply` of Keras' own base class of all optimizers."""
    replace_where_defined(keras.optimizers.Optimizer, "apply", _on_all_ranks)


def _on_all_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        if context.engine() is None:
            raise RuntimeError(LOOP.format(name=type(self).__name__))
        distribute(self)
        return original(self, grads, trainable_variables)

    return apply


def distribute(optimizer: Any) -> None:
    """Makes an optimizer average over the ranks from now on; it stays the same object, with its state.

    Args:
        optimizer: Any optimizer of Keras; of a `LossScaleOptimizer` the inner one is changed.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if not is_distributed(inner):
        with tf.init_scope():  # a trace may be under way
            inner.__class__ = type(DistributedOptimizer(inner))


def of_model(model: Any) -> list[Any]:
    """Lists the optimizers that are attributes of a model, as scripts with several keep them."""
    found = []
    for value in vars(model).values():
        each = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, list | tuple)
            else [value]
        )
        found += [one for one in each if isinstance(one, keras.optimizers.Optimizer)]
    return list({id(each): each for each in found}.values())
