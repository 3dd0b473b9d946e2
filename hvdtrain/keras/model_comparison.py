"""Note what optimizers train without averaging, and compare a model's variables over the ranks."""

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

_noted: weakref.WeakSet[Any] = weakref.WeakSet()
_installed = False


def install() -> None:
    """Note the variables of each plain optimizer that is applied, and compare them when the script ends.

    Calling this again changes nothing.
    """
    global _installed
    if not _installed:
        _installed = True
        replace_where_defined(keras.optimizers.Optimizer, "apply", _noting)
        runtime.before_end(divergence.compare_at_end)


def compare_model(engine: Engine, model: Any, when: str) -> None:
    """Compare the trainable variables of a model now, those of frozen layers included.

    Args:
        engine: The ranks that train the model together; all of them call this.
        model: The model.
        when: The moment, for the message.

    Raises:
        MismatchError: On every rank, if a variable differs that is not local.
    """
    divergence.compare(engine, _variables(model), when)


def forget_model(model: Any) -> None:
    """Leave a model's variables out of the comparison at the end: one rank may load others for its evaluation."""
    registry.forget(_variables(model))


def _variables(model: Any) -> list[Any]:
    # Not `trainable_variables`, which leaves out frozen layers: they may be unfrozen later.
    found = [each for layer in model._flatten_layers() for each in layer._trainable_variables]
    return list({id(each): each for each in found}.values())


def _noting(apply: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        result = apply(self, grads, trainable_variables)
        _note(self)
        return result

    return run


@tf.autograph.experimental.do_not_convert
def _note(optimizer: Any) -> None:
    """Note once what an optimizer trains, if it averages nothing itself."""
    if optimizer in _noted or is_distributed(optimizer) or not runtime.is_initialized():
        return
    if runtime.engine().size > 1:
        _noted.add(optimizer)
        # Where there are process sets, each may train a model of its own.
        expected = not runtime.engines_of_sets
        registry.note_plain(
            runtime.engine(),
            TensorFlowBridge().readable(optimizer._trainable_variables),
            type(optimizer).__name__,
            expected,
        )
