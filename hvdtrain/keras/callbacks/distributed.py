"""Stock callbacks, unchanged, on several ranks: one decision, one file, one error for all."""

from typing import Any

import keras
import numpy as np

from hvdtrain.collectives.engine import Op
from hvdtrain.keras.callbacks.batch_norm import AverageBatchNormStatistics
from hvdtrain.keras.callbacks.broadcast import BroadcastGlobalVariablesCallback
from hvdtrain.keras.callbacks.checkpoint import Checkpoint
from hvdtrain.keras.callbacks.error_propagation import telling
from hvdtrain.keras.callbacks.forwarding import Forwarding
from hvdtrain.keras.callbacks.membership import engine_of, writes
from hvdtrain.keras.callbacks.metric_average import MetricAverageCallback
from hvdtrain.keras.callbacks.random_states import RandomStatesCallback
from hvdtrain.keras.callbacks.rank_zero import WRITERS, RankZeroCallback
from hvdtrain.keras.callbacks.validation import DivideValidation

# What looks for these, Keras or we, looks through its own list.
_TOP_LEVEL = (keras.callbacks.History, keras.callbacks.ProgbarLogger, Checkpoint)
_ADDED = (
    BroadcastGlobalVariablesCallback,
    MetricAverageCallback,
    RandomStatesCallback,
    AverageBatchNormStatistics,
    DivideValidation,
)
_STOPS = ("on_epoch_begin", "on_epoch_end")
_BATCH_HOOKS = ("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end")


def distributed(callbacks: Any = None, average_batch_norm: bool = True) -> list[keras.callbacks.Callback]:
    """Make Keras' callbacks, and your own, right on several ranks, without a change to them.

    `model.fit(..., callbacks=hvd.callbacks.distributed([EarlyStopping(), ModelCheckpoint("m.keras")]))`

    - All ranks start from the weights of rank 0, also where `BackupAndRestore` has restored them.
    - The logs are those of all ranks' samples, so EarlyStopping, ReduceLROnPlateau, LearningRateScheduler and
      callbacks of your own, which run on every rank, decide alike.
    - ModelCheckpoint, BackupAndRestore, CSVLogger, TensorBoard and RemoteMonitor run on rank 0 only; the other
      ranks never touch the disk, and show no progress bar. What you give as `hvd.callbacks.RankZeroCallback(...)`
      does so too.
    - `model.stop_training`, set on one rank, stops all at the same batch (TerminateOnNaN) or epoch.
    - A callback that raises on one rank ends all ranks, with its name.
    - Validation data in arrays, the same on all ranks, is divided among them.
    - BatchNormalization's statistics are averaged before each validation and save.
    - Dropout and augmentation layers draw other numbers on each rank.

    The hvd callbacks for these purposes may be in the list, with arguments of your own; those that are not are
    added. A model without `hvd.DistributedOptimizer` is reported.

    Args:
        callbacks: A list of callbacks, or one.
        average_batch_norm: False to leave to each rank the statistics of its own batches, of which those of rank 0
            are saved.

    Returns:
        A list of callbacks for `model.fit`.

    Raises:
        TypeError: If one of them is no callback.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    given = [inner for each in keras.tree.flatten(callbacks or []) for inner in _taken_apart(each)]
    strange = next((each for each in given if not isinstance(each, keras.callbacks.Callback)), None)
    if strange is not None:
        raise TypeError(
            "hvd.callbacks.distributed: each of the list must be a keras.callbacks.Callback, such as "
            f"EarlyStopping(). Received: {strange!r}."
        )
    top = [each for each in given if isinstance(each, _TOP_LEVEL)]
    return [Together([each for each in given if each not in top], average_batch_norm), *top]


def _taken_apart(callback: Any) -> list[Any]:
    return callback.given if isinstance(callback, Together) else [callback]


class Together(Forwarding):
    """Runs callbacks on all ranks in step.

    Args:
        callbacks: The callbacks.
        average_batch_norm: Whether to average BatchNormalization's statistics.
    """

    combines_ranks = True  # what a model measures with it is that of all ranks

    def __init__(self, callbacks: list[Any], average_batch_norm: bool) -> None:
        super().__init__()
        self.given = callbacks
        self._broadcast = _first(callbacks, BroadcastGlobalVariablesCallback)
        self._metrics = _first(callbacks, MetricAverageCallback) or MetricAverageCallback()
        self._random = _first(callbacks, RandomStatesCallback) or RandomStatesCallback()
        self._validation = _first(callbacks, DivideValidation) or DivideValidation()
        self._norms = [each for each in callbacks if isinstance(each, AverageBatchNormStatistics)]
        if average_batch_norm and not self._norms:
            self._norms = [AverageBatchNormStatistics(each) for each in _save_freqs(callbacks)]
        self._members = [
            RankZeroCallback(each) if isinstance(each, WRITERS) else each
            for each in callbacks
            if not isinstance(each, _ADDED)
        ]
        self._every_batch = any(_may_stop_at_a_batch(each) for each in self._members)

    @property
    def inner(self) -> list[Any]:
        """The callbacks that were given."""
        return self.given

    def set_model(self, model: Any) -> None:
        """Hand the model on; only rank 0 prints."""
        super().set_model(model)
        if self._broadcast is None:
            self._broadcast = BroadcastGlobalVariablesCallback(engine_of(model).ranks[0])
        for each in self._in_order:
            each.set_model(model)
            if not writes(model) and type(each).__module__.startswith("keras.") and hasattr(each, "verbose"):
                each.verbose = 0

    def set_params(self, params: Any) -> None:
        """Hand the parameters of `fit` on; the progress bar, which comes later, gets the same dictionary."""
        if params and not writes(self.model):
            params["verbose"] = 0
        super().set_params(params)
        for each in self._in_order:
            each.set_params(params)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Restore on rank 0, gives all ranks what was restored, and lets the others begin."""
        restoring = [each for each in self._members if _restores(each)]
        for each in restoring:
            self._call(each, "on_train_begin", logs)
        if restoring:
            self._go_on_together()
        for each in (self._broadcast, *self._in_order[:-1]):
            if each not in restoring:
                self._call(each, "on_train_begin", logs)

    def forward(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Hand an event on, and stops all ranks where one has stopped."""
        for each in self._in_order:
            self._call(each, hook, *args, **kwargs)
        if hook in _STOPS or (hook == "on_train_batch_end" and self._every_batch):
            self._stop_together()

    @property
    def _in_order(self) -> list[Any]:
        """Lists all callbacks; the last one compares the learning rates that the others have set."""
        return [self._validation, self._metrics, self._random, *self._norms, *self._members, self._broadcast]

    def _call(self, callback: Any, hook: str, *args: Any, **kwargs: Any) -> None:
        with telling(engine_of(self.model), f"{type(_inner(callback)).__name__}.{hook}"):
            getattr(callback, hook)(*args, **kwargs)

    def _go_on_together(self) -> None:
        engine = engine_of(self.model)
        if self._broadcast.root_rank != engine.ranks[0]:
            raise ValueError(
                f"BackupAndRestore restores on rank {engine.ranks[0]}, but all ranks would then take the weights "
                f"of another. Give BroadcastGlobalVariablesCallback root_rank={engine.ranks[0]}. Received: "
                f"root_rank={self._broadcast.root_rank}."
            )
        self.model._initial_epoch = engine.broadcast_object(self.model._initial_epoch, engine.ranks[0])

    def _stop_together(self) -> None:
        engine = engine_of(self.model)
        if engine.size > 1:
            mine = np.array([bool(self.model.stop_training)], np.uint8)
            self.model.stop_training = bool(engine.allreduce(mine, Op.MAX)[0])


def _first(callbacks: list[Any], kind: type) -> Any:
    return next((each for each in callbacks if isinstance(each, kind)), None)


def _restores(member: Any) -> bool:
    return isinstance(_inner(member), keras.callbacks.BackupAndRestore)


def _inner(member: Any) -> Any:
    """Return the callback that rank 0 runs for all, or the one that every rank runs."""
    return member.callback if isinstance(member, RankZeroCallback) else member


def _save_freqs(callbacks: list[Any]) -> list[str | int]:
    """List how often something is saved: once an epoch, and after each of these numbers of batches."""
    found = {getattr(each, "save_freq", None) for each in callbacks if isinstance(each, WRITERS)}
    return ["epoch", *sorted(each for each in found if isinstance(each, int) and each > 0)]


def _may_stop_at_a_batch(member: Any) -> bool:
    """Return whether a callback looks at each batch and may stop there; of Keras' own only one does."""
    inner = _inner(member)
    if isinstance(inner, keras.callbacks.TerminateOnNaN):
        return True
    owners = [getattr(inner, hook).__module__ for hook in _BATCH_HOOKS]
    return not all((owner or "").startswith(("keras.", "hvdtrain.")) for owner in owners)
