"""All ranks start from the weights of one."""

from typing import Any

import keras

from hvdtrain import runtime
from hvdtrain.keras.optimizer import is_distributed
from hvdtrain.keras.variables import broadcast_variables


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Starts all ranks from the weights of one, whatever each has initialised or loaded.

    Before the first step, weights, non-trainable state (such as BatchNorm's statistics) and the optimizer's
    state are copied from `root_rank`. States of random generators are not: dropout goes on differing
    between ranks. Horovod copies after the first step, when it is too late for that step
    (https://horovod.readthedocs.io/en/stable/keras.html).

    Args:
        root_rank: The rank whose values all take; usually the one that loads a checkpoint.
        device: Accepted for Horovod's sake; TensorFlow places the copies.
    """

    def __init__(self, root_rank: int = 0, device: str = "") -> None:
        super().__init__()
        self.root_rank = root_rank
        self._device = device

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Copies everything, after Keras has built the model and before it runs a step."""
        engine, optimizer = runtime.engine(), self.model.optimizer
        if engine.size > 1 and not is_distributed(optimizer):
            engine.say(
                f"this model's optimizer, {type(optimizer).__name__}, is not distributed: each rank trains a "
                "model of its own from here on. Compile the model with hvd.DistributedOptimizer(...)."
            )
        if optimizer is not None and not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        state = optimizer.variables if optimizer is not None else []
        broadcast_variables([*self.model.weights, *state], self.root_rank)
