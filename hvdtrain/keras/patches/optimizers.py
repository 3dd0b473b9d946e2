"""Let all ranks decide together whether an update is skipped, and record variables trained without averaging.

- `LossScaleOptimizer.check_finite`. Keras skips the update if the gradients of this process are not finite.
  Gradients are reduced within the update, so the other ranks would wait for a rank that skips it. Replacement:
  the result is whether the gradients are finite on all ranks of the optimizer's process set.
- `Optimizer.apply`. An optimizer that does not average trains a different model on each rank without an error.
  Replacement: its variables are recorded, and compared over the ranks when the script ends.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.backends.tensorflow import host_calls
from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
from hvdtrain.gradients import divergence
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.keras.optimizer.distributed import is_distributed, trains_on_several_ranks
from hvdtrain.patching import replace, replace_where_defined
from hvdtrain.runtime.process_sets import engine_or_alone

_recorded: weakref.WeakSet[Any] = weakref.WeakSet()


@functools.cache
def install() -> None:
    """Replace the methods that the docstring of this module lists. A second call has no effect."""
    replace(keras.optimizers.LossScaleOptimizer, "check_finite", _checking_all_ranks)
    replace_where_defined(keras.optimizers.Optimizer, "apply", _recording)
    runtime.before_end(divergence.compare_at_end)


def _checking_all_ranks(check_finite: Callable[..., Any]) -> Callable[..., Any]:
    def decide(self: Any, grads: Any) -> Any:
        finite = check_finite(self, grads)
        if not trains_on_several_ranks(self):
            return finite
        return host_calls.all_true(engine_or_alone(self.inner_optimizer.process_set), finite)

    return decide


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
        variables = TensorFlowBridge().readable(optimizer._trainable_variables)
        # If there are process sets, each of them may train a different model.
        expected = not runtime.engines_of_sets
        registry.note_plain(runtime.engine(), variables, type(optimizer).__name__, expected)
