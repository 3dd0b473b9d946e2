"""Let all ranks decide together whether a `LossScaleOptimizer` skips an update.

Keras: `LossScaleOptimizer.check_finite` returns whether the gradients of this process are finite; if they are
not, the update is skipped and the loss scale is reduced.

On several ranks: gradients are reduced within the update. A rank that skips it does not take part in the
reduction, the other ranks wait for it, and the job hangs.

Replacement: `check_finite` returns whether the gradients are finite on all ranks of the optimizer's process
set. For an optimizer that is not distributed the result is that of Keras.

Checked with Keras 3.5 to 3.15.
"""

from typing import Any

import keras

from hvdtrain.backends.tensorflow import host_calls
from hvdtrain.keras.optimizer.distributed import trains_on_several_ranks
from hvdtrain.patching import replace
from hvdtrain.runtime.process_sets import engine_or_alone

_installed = False


def install() -> None:
    """Replace `LossScaleOptimizer.check_finite`. A second call has no effect."""
    global _installed
    if _installed:
        return
    _installed = True
    replace(keras.optimizers.LossScaleOptimizer, "check_finite", _check_on_all_ranks)


def _check_on_all_ranks(check_finite: Any) -> Any:
    def decide(self: Any, grads: Any) -> Any:
        finite = check_finite(self, grads)
        if not trains_on_several_ranks(self):
            return finite
        return host_calls.all_true(engine_or_alone(self.inner_optimizer.process_set), finite)

    return decide
