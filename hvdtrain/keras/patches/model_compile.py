"""Turn `jit_compile` off at `Model.compile` for models whose training step cannot be divided.

Keras: with `jit_compile` the whole training step is one XLA program.

On several ranks: no collective can run inside an XLA program, so the gradients could not be averaged.
`train_function.py` divides Keras' own training step into two parts. A `train_step` that a class defines
itself cannot be divided, because its parts are not known.

Replacement: `Model.compile` sets `jit_compile` to False for such a model if its optimizer is distributed, and
rank 0 reports it. All other models are compiled as by Keras.

Checked with Keras 3.5 to 3.15.
"""

from typing import Any

import keras

from hvdtrain import runtime
from hvdtrain.keras.optimizer.distributed import trains_on_several_ranks
from hvdtrain.keras.patches import train_function
from hvdtrain.patching import replace_where_defined

_installed = False


def install() -> None:
    """Replace `Model.compile`, and the functions of `train_function.py`. A second call has no effect."""
    global _installed
    if _installed:
        return
    _installed = True
    # In the class that defines it: a loaded model compiles itself only if its class did not override compile.
    replace_where_defined(keras.Model, "compile", _compiling)
    train_function.install(lambda model: trains_on_several_ranks(getattr(model, "optimizer", None)))


def _compiling(compile_model: Any) -> Any:
    def compile_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = compile_model(self, *args, **kwargs)
        if (
            trains_on_several_ranks(self.optimizer)
            and self.jit_compile
            and not train_function.can_be_divided(self)
        ):
            self.jit_compile = False
            runtime.engine().say(
                f"jit_compile is turned off for this model: {type(self).__name__} defines its own train_step, and "
                "gradients cannot leave an XLA program to be averaged over the ranks."
            )
        return result

    return compile_and_check
