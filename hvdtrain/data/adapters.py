"""Read sharded data for Keras: count its steps, and notify it when an epoch of training begins and ends."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter

from hvdtrain import runtime
from hvdtrain.data.sharded_dataset import ShardedDataset


class _Epochs:
    """Mixin for Keras' adapters that notifies sharded data when an epoch of training begins and ends.

    Keras also calls `on_epoch_end` when no epoch has begun; and evaluation and prediction must not change the order
    of the training data.
    """

    _begun = False
    _sharded: Any
    _training: bool

    def on_epoch_begin(self) -> None:
        """Begin an epoch of the sharded data, if `fit` trains on it."""
        if self._training:
            self._begun = True
            self._sharded.begin()
        super().on_epoch_begin()  # type: ignore[misc]

    def on_epoch_end(self) -> None:
        """End the epoch of the sharded data, if one has begun."""
        super().on_epoch_end()  # type: ignore[misc]
        if self._begun:
            self._begun = False
            self._sharded.end()


class DatasetAdapter(_Epochs, PyDatasetAdapter):
    """Adapter that reads sharded arrays and PyDatasets; see `TFAdapter` for its arguments."""

    def __init__(self, data: ShardedDataset, sharded: ShardedDataset, training: bool) -> None:
        self._sharded, self._training = sharded, training
        super().__init__(data, shuffle=False)

    def on_epoch_begin(self) -> None:
        """Begin an epoch; outside of training, call only `on_epoch_begin` of the user's PyDataset."""
        if not self._training:
            self._sharded.source.begin(self._sharded.position.epoch)
        super().on_epoch_begin()

    def _standardize_batch(self, batch: Any) -> Any:
        return batch  # a single x is not wrapped in a tuple, as with arrays


class TFAdapter(_Epochs, TFDatasetAdapter):
    """Adapter that reads sharded `tf.data.Dataset`s and generators.

    Args:
        data: The data to read.
        sharded: The result of `hvd.shard`, which is notified of the ends of epochs.
        training: Whether `fit` trains on it.
        window: The `steps_per_epoch` of the `fit`, None for a whole epoch.
    """

    def __init__(self, data: Any, sharded: Any, training: bool, window: int | None) -> None:
        self._sharded, self._training, self._window = sharded, training, window
        super().__init__(data)

    @property
    def num_batches(self) -> int | None:
        """Steps of an epoch; None where the number is unknown before the data has been read."""
        if self._training:
            return self._window or self._sharded.num_batches
        return self._sharded.steps

    def on_epoch_end(self) -> None:
        """Advance by `steps_per_epoch` if `fit` was given it; else end the epoch."""
        if self._begun and self._window:
            self._begun = False
            self._sharded.position.advance(self._window, self._sharded.steps)
        super().on_epoch_end()


def untuned(get_iterated: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keep `tf.data` from tuning itself while Keras reads, so that an epoch starts without a pause.

    The tuning thread sleeps for 10 ms, then 20, 40, … up to a minute. Keras destroys an iterator once an epoch.
    That wakes the thread and only then marks it as cancelled (TensorFlow's `CancellationManager` runs its
    callbacks first), so a thread that checks in between sleeps again, and the destructor waits for it: for about
    as long as the epoch took. Without tuning, an operation with `num_parallel_calls=AUTOTUNE` makes as many calls
    at once as the rank has cores, at most 16, and `prefetch(AUTOTUNE)` still chooses its own buffer size.

    Args:
        get_iterated: Keras' `TFEpochIterator._get_iterator`, which returns the data to read in an epoch.
    """

    def get(self: Any) -> Any:
        dataset = get_iterated(self)
        if not isinstance(dataset, tf.data.Dataset) or dataset.options().autotune.enabled is not None:
            return dataset  # a tf.distribute strategy owns it, or the user has set autotune
        options = tf.data.Options()
        options.autotune.enabled = False
        return dataset.with_options(options)

    return get


class Follow(keras.callbacks.Callback):
    """Count steps for `data.state()` of sharded data, and report losses that do not add up over ranks.

    Args:
        data: The result of `hvd.shard`.
        losses: The `Losses` of the model; None on one rank.
    """

    def __init__(self, data: Any, losses: Any) -> None:
        super().__init__()
        self._data, self._losses = data, losses
        self._reported = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start counting steps from 0."""
        self._data.position.done = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the steps whose batches were trained on."""
        self._data.position.done = batch + 1
        if not self._reported:
            self._report()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Report losses whose kind the first step could not determine."""
        self._report()

    def _report(self) -> None:
        self._reported = True
        if self._losses is not None:
            self._losses.report(runtime.engine())


def preceded(model: keras.Model, callbacks: Any, first: keras.callbacks.Callback) -> Any:
    """Put a callback before those given to `fit`, and remove one of the same type from an earlier `fit`.

    Args:
        model: The model that is fitted.
        callbacks: The `callbacks` argument of `fit`: None, a callback, a list, or a `keras.callbacks.CallbackList`.
        first: The callback.

    Returns:
        The callbacks to pass to `fit` instead.
    """
    if not callbacks:
        return [first]
    if isinstance(callbacks, list | tuple):
        return [first, *callbacks]
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [first, callbacks]
    others = [callback for callback in callbacks.callbacks if not isinstance(callback, type(first))]
    callbacks.callbacks[:] = [first, *others]
    first.set_model(model)
    first.set_params(callbacks.params)
    return callbacks
