"""`--scale-batch`: each rank keeps the script's batch, and the learning rate grows with the number of ranks."""

from typing import Any
from weakref import WeakSet

import keras

from hvdtrain.collectives.engine import Engine
from hvdtrain.keras.callbacks import LearningRateWarmupCallback
from hvdtrain.wrap import data_reading
from hvdtrain.wrap.optimizers import of_model

WARMUP_EPOCHS = 5

_LEAVE_OUT = "Or leave out --scale-batch: then each rank takes its part of the script's own batch."

# Optimizers whose rate has been multiplied already.
_scaled: WeakSet[Any] = WeakSet()


def prepare(engine: Engine, model: Any, arguments: dict[str, Any]) -> None:
    """Multiplies batch and learning rate of a `fit`, and lets the rate rise gently.

    The rule is that of Goyal et al. 2017, arXiv:1706.02677: n times the batch, n times the rate, warmed up.

    Args:
        engine: The ranks.
        model: The model.
        arguments: Those of its `fit`; they are changed.

    Raises:
        ValueError: If the rate cannot be set.
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
    arguments["callbacks"] = [callback, *_listed(arguments.get("callbacks"))]
    engine.say(
        f"--scale-batch: {engine.size} times the script's batch, and {engine.size} times its learning rate "
        f"({base * engine.size:g}), reached after {warm_up} epoch{'s' if warm_up > 1 else ''} of warm-up."
    )


def _only_optimizer(model: Any) -> Any:
    """Returns a model's optimizer if its rate can be multiplied, None if it has none."""
    inner = {id(each): each for each in (getattr(one, "inner_optimizer", one) for one in of_model(model))}
    if not inner:
        return None
    if len(inner) > 1:
        raise ValueError(
            f"hvdtrain run --wrap --scale-batch multiplies one learning rate, but {type(model).__name__} has "
            f"{len(inner)} optimizers. {_LEAVE_OUT}"
        )
    (optimizer,) = inner.values()
    rate = getattr(optimizer, "_learning_rate", None)
    if not isinstance(rate, keras.Variable):
        raise ValueError(
            f"hvdtrain run --wrap --scale-batch multiplies the learning rate, but that of this "
            f"{type(optimizer).__name__} comes from {type(rate).__name__}, which cannot be set. Give the optimizer "
            f"a number. {_LEAVE_OUT}"
        )
    return optimizer


def _listed(callbacks: Any) -> list[Any]:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
