"""Keep the ranks equal during `fit`: same initial state, same logs, same last step, same weights."""

import time
from typing import Any

import keras

from hvdtrain.collectives.engine import Engine, MismatchError
from hvdtrain.data import structures
from hvdtrain.keras.collectives import broadcast_variables
from hvdtrain.wrap.optimizers import of_model

# Averaging gradients and starting a step take milliseconds, which more ranks do not reduce. In seconds.
_SMALL_STEP, _ENOUGH_STEPS = 0.005, 10
_BATCH_HOOKS = ("on_train_batch_end", "on_batch_end", "on_train_batch_begin", "on_batch_begin")


def with_lockstep_callbacks(engine: Engine, callbacks: Any) -> Any:
    """Return the callbacks of the script with `FirstCallback` before and `LastCallback` after them."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        added = (FirstCallback(engine), LastCallback(engine, []))
        for callback in added:
            callback.set_model(callbacks.model)
            callback.set_params(callbacks.params)
        callbacks.callbacks.insert(0, added[0])
        callbacks.callbacks.append(added[1])
        return callbacks
    users = as_list(callbacks)
    return [FirstCallback(engine), *users, LastCallback(engine, users)]


def as_list(callbacks: Any) -> list[Any]:
    """Return the callbacks of a script, given as None, one callback, a list or a tuple, as a list."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]


class FirstCallback(keras.callbacks.Callback):
    """A callback before all others that gives all ranks equal weights and equal logs.

    Args:
        engine: The ranks.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def on_train_begin(self, logs: Any = None) -> None:
        """Give all ranks the weights, optimizer states and seeds of rank 0."""
        variables = list(self.model.variables)
        for optimizer in of_model(self.model):
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
        users: The script's callbacks.
    """

    def __init__(self, engine: Engine, users: Any) -> None:
        super().__init__()
        self._engine = engine
        self._stop_after_any_batch = any(_acts_on_batches(callback) for callback in users)
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
        checksums = {
            variable.path: structures.checksum(variable.numpy()) for variable in self.model.variables
        }
        of_ranks = self._engine.allgather_object(checksums)
        unequal = []
        for path, checksum in checksums.items():
            if any(of_rank.get(path) != checksum for of_rank in of_ranks):
                unequal.append(path)
        if self._engine.allgather_object(bool(unequal)) != [False] * self._engine.size:
            raise MismatchError(
                "hvdtrain run --wrap: after a step the ranks do not have the same "
                f"{', '.join(unequal[:3]) or 'weights'}. A layer probably computes it from the batch, but each "
                "rank computes only its rows. --wrap cannot distribute such a model; use "
                "hvd.DistributedOptimizer in the script, and hvdtrain run."
            )


def _acts_on_batches(callback: Any) -> bool:
    kind = type(callback)
    if kind.__module__.startswith(("keras.", "hvdtrain.")):
        return False
    return any(getattr(kind, hook) is not getattr(keras.callbacks.Callback, hook) for hook in _BATCH_HOOKS)
