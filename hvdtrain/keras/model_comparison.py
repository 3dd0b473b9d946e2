"""Record variables that are trained without averaging, and compare a model's variables over the ranks."""

import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
from hvdtrain.collectives.engine import Engine
from hvdtrain.gradients import divergence
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.keras.optimizer.distributed import is_distributed
from hvdtrain.patching import replace_where_defined

_recorded: weakref.WeakSet[Any] = weakref.WeakSet()
_installed = False


def install() -> None:
    """Record the variables of optimizers that do not average, and compare them when the script ends.

    A second call has no effect.
    """
    global _installed
    if not _installed:
        _installed = True
        replace_where_defined(keras.optimizers.Optimizer, "apply", _recording)
        runtime.before_end(divergence.compare_at_end)


def compare_model(engine: Engine, model: Any, when: str) -> None:
    """Compare the trainable variables of a model over the ranks, including those of frozen layers.

    Args:
        engine: The ranks that train the model together; all of them call this.
        model: The model.
        when: The time of the comparison, for the message.

    Raises:
        MismatchError: On every rank, if a variable differs that is not registered as local.
    """
    divergence.compare(engine, _variables(model), when)


def forget_model(model: Any) -> None:
    """Exclude a model from the comparison at the end, because one rank may load other weights to evaluate."""
    registry.forget(_variables(model))


def _variables(model: Any) -> list[Any]:
    # Not `trainable_variables`, which leaves out frozen layers: they may be unfrozen later.
    found = [variable for layer in model._flatten_layers() for variable in layer._trainable_variables]
    return list({id(variable): variable for variable in found}.values())


def _recording(apply: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        result = apply(self, grads, trainable_variables)
        _record(self)
        return result

    return run


@tf.autograph.experimental.do_not_convert
def _record(optimizer: Any) -> None:
    """Record the variables of an optimizer once, if it does not average gradients."""
    if optimizer in _recorded or is_distributed(optimizer) or not runtime.is_initialized():
        return
    if runtime.engine().size > 1:
        _recorded.add(optimizer)
        # If there are process sets, each of them may train a different model.
        expected = not runtime.engines_of_sets
        registry.note_plain(
            runtime.engine(),
            TensorFlowBridge().readable(optimizer._trainable_variables),
            type(optimizer).__name__,
            expected,
        )
