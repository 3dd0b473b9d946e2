"""Change the arguments of `fit`: callbacks that keep the ranks equal, and larger batches with `--scale-batch`."""

import time
from typing import Any
from weakref import WeakSet

import keras

from hvdtrain.collectives.engine import Engine
from hvdtrain.data import structures
from hvdtrain.data.adapters import preceded
from hvdtrain.data.collective_errors import compare
from hvdtrain.keras.callbacks import LearningRateWarmupCallback
from hvdtrain.keras.collectives import broadcast_variables

# Averaging gradients and starting a step take milliseconds, which more ranks do not reduce. In seconds.
_SMALL_STEP, _ENOUGH_STEPS = 0.005, 10
_BATCH_HOOKS = ("on_train_batch_end", "on_batch_end", "on_train_batch_begin", "on_batch_begin")
_WARMUP_EPOCHS = 5

_NOT_EQUAL = (
    "A layer probably computes it from the batch, but each rank computes only its rows. --wrap cannot distribute "
    "such a model; use hvd.DistributedOptimizer in the script, and hvdtrain run."
)
_LEAVE_OUT = "Or leave out --scale-batch: then each rank takes its part of the script's batch."

# Optimizers whose learning rate has been multiplied already.
_scaled: WeakSet[Any] = WeakSet()


def optimizers_of(model: Any) -> list[Any]:
    """List the optimizers that are attributes of a model, alone or in a list, tuple or dictionary."""
    found = {}
    for attribute in vars(model).values():
        values = [attribute]
        if isinstance(attribute, dict):
            values = list(attribute.values())
        elif isinstance(attribute, list | tuple):
            values = list(attribute)
        for value in values:
            if isinstance(value, keras.optimizers.Optimizer):
                found[id(value)] = value
    return list(found.values())


def add_callbacks(engine: Engine, model: Any, arguments: dict[str, Any]) -> None:
    """Put `FirstCallback` before the callbacks of a `fit`, and `LastCallback` after them."""
    callbacks = preceded(model, arguments.get("callbacks"), FirstCallback(engine))
    if isinstance(callbacks, keras.callbacks.CallbackList):
        last = LastCallback(engine, [])
        last.set_model(model)
        last.set_params(callbacks.params)
        # Without that of an earlier fit with the same list.
        others = [callback for callback in callbacks.callbacks if not isinstance(callback, LastCallback)]
        callbacks.callbacks[:] = [*others, last]
    else:
        callbacks = [*callbacks, LastCallback(engine, callbacks)]
    arguments["callbacks"] = callbacks


class FirstCallback(keras.callbacks.Callback):
    """A callback before all others that gives all ranks equal weights and equal logs."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def on_train_begin(self, logs: Any = None) -> None:
        """Give all ranks the weights, optimizer states and seeds of rank 0."""
        variables = list(self.model.variables)
        for optimizer in optimizers_of(self.model):
            variables += optimizer.variables
        broadcast_variables(variables)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Replace the logs by those of rank 0: the last bits may differ between different machines."""
        if logs is not None:
            logs.update(self._engine.broadcast_object(dict(logs)))


class LastCallback(keras.callbacks.Callback):
    """A callback after all others that stops all ranks where rank 0 stops, and compares the weights.

    Args:
        engine: The ranks.
        others: The callbacks before this one.
    """

    def __init__(self, engine: Engine, others: Any) -> None:
        super().__init__()
        self._engine = engine
        self._stop_after_any_batch = any(_acts_on_batches(callback) for callback in others)
        self._checked = False
        self._began: float | None = None  # end of the first step of the first epoch, in seconds
        self._steps = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Stop all ranks where rank 0 stops; compare the weights after the first step."""
        if not self._checked:
            self._checked = True
            self._compare()
            self._began = time.monotonic()
        self._steps = batch
        if self._stop_after_any_batch:
            self._agree_to_stop()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stop all ranks where rank 0 stops, and compare the weights."""
        self._hint_at_small_steps()
        self._agree_to_stop()
        self._compare()

    def _hint_at_small_steps(self) -> None:
        began, self._began = self._began, None
        if began is None or self._steps < _ENOUGH_STEPS:
            return
        seconds = (time.monotonic() - began) / self._steps
        if seconds < _SMALL_STEP:
            self._engine.say(
                f"a step takes {1000 * seconds:.1f} ms on {self._engine.size} ranks, which is too little work to "
                "divide: one process is probably as fast. Larger batches gain more, for example with "
                "--scale-batch."
            )

    def _agree_to_stop(self) -> None:
        self.model.stop_training = self._engine.broadcast_object(bool(self.model.stop_training))

    def _compare(self) -> None:
        facts = []
        for variable in self.model.variables:
            facts.append((variable.path, f"checksum {structures.checksum(variable.numpy()):08x}"))
        compare(self._engine, "hvdtrain run --wrap, after a step", facts, _NOT_EQUAL)


def _acts_on_batches(callback: Any) -> bool:
    kind = type(callback)
    if kind.__module__.startswith(("keras.", "hvdtrain.")):
        return False
    return any(getattr(kind, hook) is not getattr(keras.callbacks.Callback, hook) for hook in _BATCH_HOOKS)


def scale(engine: Engine, model: Any, arguments: dict[str, Any]) -> None:
    """Multiply the learning rate of a `fit` by the number of ranks, after a warm-up, and divide its steps by it.

    This is the rule of Goyal et al. 2017, arXiv:1706.02677: n times the batch, n times the rate, after a warm-up.

    Args:
        engine: The ranks.
        model: The model.
        arguments: The arguments of its `fit`. They are changed in place.

    Raises:
        ValueError: If the learning rate cannot be set.
    """
    if arguments.get("steps_per_epoch"):
        arguments["steps_per_epoch"] = -(-arguments["steps_per_epoch"] // engine.size)
    optimizer = _only_optimizer(model)
    if optimizer is None or optimizer in _scaled:
        return
    _scaled.add(optimizer)
    rate = float(optimizer.learning_rate) * engine.size
    warm_up = max(1, min(_WARMUP_EPOCHS, arguments.get("epochs", 1) // 10))
    callback = LearningRateWarmupCallback(rate, warm_up)
    given = arguments.get("callbacks")
    # A list that the script keeps must not warm up again in its next fit.
    kept = isinstance(given, keras.callbacks.CallbackList)
    arguments["callbacks"] = [callback, given] if kept else preceded(model, given, callback)
    engine.say(
        f"--scale-batch: {engine.size} times the script's batch, and {engine.size} times its learning rate "
        f"({rate:g}), reached after {warm_up} epoch{'s' if warm_up > 1 else ''} of warm-up."
    )


def _only_optimizer(model: Any) -> Any:
    """Return the optimizer of a model, None if it has none; raise if its learning rate cannot be multiplied."""
    inner = {getattr(optimizer, "inner_optimizer", optimizer) for optimizer in optimizers_of(model)}
    if not inner:
        return None
    if len(inner) > 1:
        raise ValueError(
            f"hvdtrain run --wrap --scale-batch multiplies one learning rate, but {type(model).__name__} has "
            f"{len(inner)} optimizers. {_LEAVE_OUT}"
        )
    (optimizer,) = inner
    rate = getattr(optimizer, "_learning_rate", None)
    if not isinstance(rate, keras.Variable):
        raise ValueError(
            f"hvdtrain run --wrap --scale-batch multiplies the learning rate, but the rate of this "
            f"{type(optimizer).__name__} comes from {type(rate).__name__}, which cannot be set. Give the optimizer "
            f"a number. {_LEAVE_OUT}"
        )
    return optimizer
