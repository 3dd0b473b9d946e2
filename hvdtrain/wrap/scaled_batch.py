"""Implement `--scale-batch`: keep the script's batch on each rank and multiply the learning rate by the size."""

from typing import Any
from weakref import WeakSet

import keras

from hvdtrain.collectives.engine import Engine
from hvdtrain.keras.callbacks import LearningRateWarmupCallback
from hvdtrain.wrap import data_reading
from hvdtrain.wrap.lockstep import as_list
from hvdtrain.wrap.optimizers import of_model

WARMUP_EPOCHS = 5

_LEAVE_OUT = "Or leave out --scale-batch: then each rank takes its part of the script's batch."

# Optimizers whose learning rate has been multiplied already.
_scaled: WeakSet[Any] = WeakSet()


def prepare(engine: Engine, model: Any, arguments: dict[str, Any]) -> None:
    """Multiply the batch and the learning rate of a `fit` by the number of ranks, with a warm-up of the rate.

    This is the rule of Goyal et al. 2017, arXiv:1706.02677: n times the batch, n times the rate, after a warm-up.

    Args:
        engine: The ranks.
        model: The model.
        arguments: The arguments of its `fit`. They are changed in place.

    Raises:
        ValueError: If the learning rate cannot be set.
    """
    data_reading.multiply(engine.size)
    if arguments.get("steps_per_epoch"):
        arguments["steps_per_epoch"] = -(-arguments["steps_per_epoch"] // engine.size)
    optimizer = _only_optimizer(model)
    if optimizer is None or optimizer in _scaled:
        return
    _scaled.add(optimizer)
    base, epochs = float(optimizer.learning_rate), arguments.get("epochs", 1)
    warm_up = max(1, min(WARMUP_EPOCHS, epochs // 10))
    callback = LearningRateWarmupCallback(base * engine.size, warm_up)
    arguments["callbacks"] = [callback, *as_list(arguments.get("callbacks"))]
    engine.say(
        f"--scale-batch: {engine.size} times the script's batch, and {engine.size} times its learning rate "
        f"({base * engine.size:g}), reached after {warm_up} epoch{'s' if warm_up > 1 else ''} of warm-up."
    )


def _only_optimizer(model: Any) -> Any:
    """Return the optimizer of a model, None if it has none; raise if its learning rate cannot be multiplied."""
    found = {}
    for optimizer in of_model(model):
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        found[id(inner)] = inner
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"hvdtrain run --wrap --scale-batch multiplies one learning rate, but {type(model).__name__} has "
            f"{len(found)} optimizers. {_LEAVE_OUT}"
        )
    (optimizer,) = found.values()
    rate = getattr(optimizer, "_learning_rate", None)
    if not isinstance(rate, keras.Variable):
        raise ValueError(
            f"hvdtrain run --wrap --scale-batch multiplies the learning rate, but the rate of this "
            f"{type(optimizer).__name__} comes from {type(rate).__name__}, which cannot be set. Give the optimizer "
            f"a number. {_LEAVE_OUT}"
        )
    return optimizer
