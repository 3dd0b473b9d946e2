"""The places where Keras decides for one process what concerns all ranks, and what is put there."""

from typing import Any

import keras

from hvdtrain import runtime
from hvdtrain.backends.tensorflow import host_calls
from hvdtrain.keras.optimizer.distributed import is_distributed
from hvdtrain.keras.patches import train_function
from hvdtrain.patching import replace, replace_where_defined
from hvdtrain.runtime.process_sets import engine_or_alone

_installed = False


def install() -> None:
    """Put the changes into Keras; they touch only models with a distributed optimizer. Once is enough.

    - `LossScaleOptimizer.check_finite` looks at one rank's gradients and skips the update if one is not
      finite. If some ranks skipped and others waited for their gradients, the job would hang.
    - With `jit_compile` the whole step becomes one XLA program, but no collective can run inside of it.
    """
    global _installed
    if _installed:
        return
    _installed = True
    replace(keras.optimizers.LossScaleOptimizer, "check_finite", _finite_everywhere)
    # A loaded model compiles itself only if its class did not override compile.
    replace_where_defined(keras.Model, "compile", _compiled)
    train_function.install(lambda model: _needs_all_ranks(getattr(model, "optimizer", None)))


def _finite_everywhere(check_finite: Any) -> Any:
    def decide(self: Any, grads: Any) -> Any:
        finite = check_finite(self, grads)
        if not _needs_all_ranks(self):
            return finite
        return host_calls.all_true(engine_or_alone(self.inner_optimizer.process_set), finite)

    return decide


def _compiled(compile_model: Any) -> Any:
    def compile_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = compile_model(self, *args, **kwargs)
        if _needs_all_ranks(self.optimizer) and self.jit_compile and not train_function.can_be_divided(self):
            self.jit_compile = False
            runtime.engine().say(
                f"jit_compile is turned off for this model: {type(self).__name__} has a train_step of its own, and "
                "gradients cannot leave an XLA program to be averaged over the ranks."
            )
        return result

    return compile_and_check


def _needs_all_ranks(optimizer: Any) -> bool:
    return is_distributed(optimizer) and runtime.is_initialized() and runtime.engine().size > 1
