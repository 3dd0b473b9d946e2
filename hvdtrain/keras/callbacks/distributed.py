"""Run unchanged callbacks on several ranks: with the same decisions, one file, and one error for all."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from hvdtrain.collectives.engine import Engine, Op
from hvdtrain.collectives.errors import HorovodInternalError, HostsUpdatedInterrupt, report
from hvdtrain.keras.batch_normalization import AverageBatchNormStatistics
from hvdtrain.keras.callbacks.checkpoint import Checkpoint
from hvdtrain.keras.callbacks.initial_state import BroadcastGlobalVariablesCallback, RandomStatesCallback
from hvdtrain.keras.callbacks.metric_average import MetricAverageCallback
from hvdtrain.keras.callbacks.rank_zero import WRITERS, Forwarding, RankZeroCallback
from hvdtrain.keras.callbacks.validation import DivideValidation
from hvdtrain.keras.membership import engine_of, writes

# Keras, or hvdtrain, looks for these in the list of `fit` itself, so they must stay at its top level.
_TOP_LEVEL = (keras.callbacks.History, keras.callbacks.ProgbarLogger, Checkpoint)
_ADDED = (
    BroadcastGlobalVariablesCallback,
    MetricAverageCallback,
    RandomStatesCallback,
    AverageBatchNormStatistics,
)
_BATCH_HOOKS = ("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end")


def distributed(callbacks: Any = None, average_batch_norm: bool = True) -> list[keras.callbacks.Callback]:
    """Adapt Keras' callbacks, and your own, to several ranks, without changes to them.

    `model.fit(..., callbacks=hvd.callbacks.distributed([EarlyStopping(), ModelCheckpoint("m.keras")]))`

    - All ranks start from the weights of rank 0, also where `BackupAndRestore` has restored them.
    - The logs are those of all ranks' samples, so EarlyStopping, ReduceLROnPlateau, LearningRateScheduler and
      your own callbacks, which run on every rank, make the same decisions.
    - ModelCheckpoint, BackupAndRestore, CSVLogger, TensorBoard and RemoteMonitor run on rank 0 only; the other
      ranks never write to disk, and show no progress bar. Callbacks inside `hvd.callbacks.RankZeroCallback(...)`
      run on rank 0 only, too.
    - `model.stop_training`, set on one rank, stops all ranks at the same batch (TerminateOnNaN) or epoch.
    - An error of a callback on one rank ends all ranks; the message names the callback.
    - Validation data in arrays, the same on all ranks, is divided among them.
    - BatchNormalization's statistics are averaged before each validation and save.
    - Dropout and augmentation layers draw different numbers on each rank.

    The hvd callbacks for these purposes may be in the list, with your own arguments; missing ones are added.
    A model without `hvd.DistributedOptimizer` is reported.

    Args:
        callbacks: A list of callbacks, or one.
        average_batch_norm: False to keep on each rank the statistics of its own batches; those of rank 0 are
            saved.

    Returns:
        A list of callbacks for `model.fit`.

    Raises:
        TypeError: If one of them is no callback.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    given = []
    for callback in keras.tree.flatten(callbacks or []):
        given += callback.inner if isinstance(callback, Distributed) else [callback]
    for callback in given:
        if not isinstance(callback, keras.callbacks.Callback):
            raise TypeError(
                "hvd.callbacks.distributed: each item of the list must be a keras.callbacks.Callback, such as "
                f"EarlyStopping(). Received: {callback!r}."
            )
    top = [callback for callback in given if isinstance(callback, _TOP_LEVEL)]
    return [Distributed([callback for callback in given if callback not in top], average_batch_norm), *top]


class Distributed(Forwarding):
    """Runs callbacks on all ranks with the same decisions; see `distributed`."""

    combines_ranks = True  # metrics of a model with this callback are those of all ranks

    def __init__(self, callbacks: list[Any], average_batch_norm: bool) -> None:
        super().__init__()
        self.inner = callbacks
        self._broadcast = _first(callbacks, BroadcastGlobalVariablesCallback)
        self._metrics = _first(callbacks, MetricAverageCallback) or MetricAverageCallback()
        self._random = _first(callbacks, RandomStatesCallback) or RandomStatesCallback()
        self._validation = DivideValidation()
        self._norms = [callback for callback in callbacks if isinstance(callback, AverageBatchNormStatistics)]
        if average_batch_norm and not self._norms:
            self._norms = [AverageBatchNormStatistics(save_freq) for save_freq in _save_freqs(callbacks)]
        self._members = [
            RankZeroCallback(callback) if isinstance(callback, WRITERS) else callback
            for callback in callbacks
            if not isinstance(callback, _ADDED)
        ]
        self._every_batch = any(_may_stop_at_a_batch(callback) for callback in self._members)

    def set_model(self, model: Any) -> None:
        """Pass the model on; only rank 0 prints."""
        super().set_model(model)
        if self._broadcast is None:
            self._broadcast = BroadcastGlobalVariablesCallback(engine_of(model).ranks[0])
        for callback in self._in_order:
            callback.set_model(model)
            of_keras = type(callback).__module__.startswith("keras.")
            if of_keras and hasattr(callback, "verbose") and not writes(model):
                callback.verbose = 0

    def set_params(self, params: Any) -> None:
        """Pass the parameters of `fit` on; the progress bar, which is called later, gets the same dictionary."""
        if params and not writes(self.model):
            params["verbose"] = 0
        super().set_params(params)
        for callback in self._in_order:
            callback.set_params(params)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Restore on rank 0, send the restored state to all ranks, then begin the other callbacks."""
        restoring = [callback for callback in self._members if _restores(callback)]
        for callback in restoring:
            self._call(callback, "on_train_begin", logs)
        if restoring:
            self._share_initial_epoch()
        for callback in (self._broadcast, *self._in_order[:-1]):
            if callback not in restoring:
                self._call(callback, "on_train_begin", logs)

    def forward(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Pass an event on, and stop all ranks if one has stopped."""
        for callback in self._in_order:
            self._call(callback, hook, *args, **kwargs)
        at_epoch = hook in ("on_epoch_begin", "on_epoch_end")
        if at_epoch or (hook == "on_train_batch_end" and self._every_batch):
            self._share_stop()

    @property
    def _in_order(self) -> list[Any]:
        """All callbacks; the last one compares the learning rates that the others have set."""
        return [self._validation, self._metrics, self._random, *self._norms, *self._members, self._broadcast]

    def _call(self, callback: Any, hook: str, *args: Any, **kwargs: Any) -> None:
        with telling(engine_of(self.model), f"{type(_unwrapped(callback)).__name__}.{hook}"):
            getattr(callback, hook)(*args, **kwargs)

    def _share_initial_epoch(self) -> None:
        root, broadcast_root = engine_of(self.model).ranks[0], self._broadcast.root_rank
        if broadcast_root != root:
            raise ValueError(
                f"BackupAndRestore restores on rank {root}, but all ranks would then take the weights of another. "
                f"Give BroadcastGlobalVariablesCallback root_rank={root}. Received: root_rank={broadcast_root}."
            )
        self.model._initial_epoch = engine_of(self.model).broadcast_object(self.model._initial_epoch, root)

    def _share_stop(self) -> None:
        engine = engine_of(self.model)
        if engine.size > 1:
            mine = np.array([bool(self.model.stop_training)], np.uint8)
            self.model.stop_training = bool(engine.allreduce(mine, Op.MAX)[0])


@contextlib.contextmanager
def telling(
    engine: Engine, what: str, kinds: tuple[type[BaseException], ...] = (Exception, SystemExit)
) -> Iterator[None]:
    """Send an error in the block to the other ranks, whose next operation raises `MismatchError` with its text.

    Args:
        engine: The ranks.
        what: Name of the work in the block, for the message.
        kinds: Classes of errors that are sent.
    """
    try:
        yield
    except (HorovodInternalError, HostsUpdatedInterrupt):
        raise  # hvd.elastic informs the other ranks itself
    except kinds as error:
        report(engine, what, error)
        raise


def _first(callbacks: list[Any], kind: type) -> Any:
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def _restores(member: Any) -> bool:
    return isinstance(_unwrapped(member), keras.callbacks.BackupAndRestore)


def _unwrapped(member: Any) -> Any:
    """Return the callback inside of a RankZeroCallback, or the callback itself."""
    return member.callback if isinstance(member, RankZeroCallback) else member


def _save_freqs(callbacks: list[Any]) -> list[str | int]:
    found = {getattr(callback, "save_freq", None) for callback in callbacks if isinstance(callback, WRITERS)}
    return ["epoch", *sorted(freq for freq in found if isinstance(freq, int) and freq > 0)]


def _may_stop_at_a_batch(member: Any) -> bool:
    """Return whether a callback may stop training at a batch; of those of Keras only TerminateOnNaN does."""
    inner = _unwrapped(member)
    if isinstance(inner, keras.callbacks.TerminateOnNaN):
        return True
    owners = [getattr(inner, hook).__module__ for hook in _BATCH_HOOKS]
    return not all((owner or "").startswith(("keras.", "hvdtrain.")) for owner in owners)
