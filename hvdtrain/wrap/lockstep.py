"""While `fit` runs: all ranks start alike, see the same logs, stop at the same step, and have not drifted apart."""

import time
from typing import Any

import keras

from hvdtrain.collectives.engine import Engine, MismatchError
from hvdtrain.data import structures
from hvdtrain.keras.broadcast_variables import broadcast_variables
from hvdtrain.wrap.optimizers import of_model

# To average gradients and to start a step take milliseconds, which more ranks do not shorten.
_SMALL_STEP, _ENOUGH_STEPS = 0.005, 10
_BATCH_HOOKS = ("on_train_batch_end", "on_batch_end", "on_train_batch_begin", "on_batch_begin")


def followed(engine: Engine, callbacks: Any) -> Any:
    """Returns the user's callbacks between one that comes first and one that comes last."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        for index, each in ((0, First(engine)), (len(callbacks.callbacks) + 1, Last(engine, []))):
            callbacks.callbacks.insert(index, each)
            each.set_model(callbacks.model)
            each.set_params(callbacks.params)
        return callbacks
    users = [] if callbacks is None else callbacks if isinstance(callbacks, list | tuple) else [callbacks]
    return [First(engine), *users, Last(engine, users)]


class First(keras.callbacks.Callback):
    """Comes before all others: equal weights, then equal logs.

    Args:
        engine: The ranks.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def on_train_begin(self, logs: Any = None) -> None:
        """Starts all ranks from rank 0's weights, optimizer states and seeds."""
        state = [each for optimizer in of_model(self.model) for each in optimizer.variables]
        broadcast_variables([*self.model.variables, *state])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Replaces the logs by rank 0's: the last bits may differ where machines do."""
        if logs is not None:
            logs.update(self._engine.broadcast_object(dict(logs)))


class Last(keras.callbacks.Callback):
    """Comes after all others: what they decided on rank 0 counts, and the weights are still the same everywhere.

    Args:
        engine: The ranks.
        users: The script's callbacks.
    """

    def __init__(self, engine: Engine, users: Any) -> None:
        super().__init__()
        self._engine = engine
        self._each_batch = any(_acts_on_batches(each) for each in users)
        self._checked = False
        self._began: float | None = None  # when the first step of the first epoch had ended
        self._steps = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Lets all ranks stop where rank 0 does; after the first step compares the weights."""
        if not self._checked:
            self._checked = True
            self._compare()
            self._began = time.monotonic()
        self._steps = batch
        if self._each_batch:
            self._agree_to_stop()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Lets all ranks stop where rank 0 does, and compares the weights."""
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
                "divide: one process is likely to be as fast. Larger batches gain more, for example by "
                "--scale-batch."
            )

    def _agree_to_stop(self) -> None:
        self.model.stop_training = self._engine.broadcast_object(bool(self.model.stop_training))

    def _compare(self) -> None:
        mine = {each.path: structures.checksum(each.numpy()) for each in self.model.variables}
        everyone = self._engine.allgather_object(mine)
        wrong = [path for path in mine if any(each.get(path) != mine[path] for each in everyone)]
        if self._engine.allgather_object(bool(wrong)) != [False] * self._engine.size:
            raise MismatchError(
                "hvdtrain run --wrap: after a step the ranks do not hold the same "
                f"{', '.join(wrong[:3]) or 'weights'}. A layer changes it by what it sees of the batch, and each "
                "rank sees its rows only. Such a model cannot be wrapped; use hvd.DistributedOptimizer in the "
                "script, and hvdtrain run."
            )


def _acts_on_batches(callback: Any) -> bool:
    known = type(callback).__module__.startswith(("keras.", "hvdtrain."))
    return not known and any(
        getattr(type(callback), each) is not getattr(keras.callbacks.Callback, each) for each in _BATCH_HOOKS
    )
