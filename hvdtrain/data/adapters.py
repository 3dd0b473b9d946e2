"""Keras' adapters for sharded data: what reads it, and tells it where epochs of training end."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter

from hvdtrain.data.sharded_dataset import ShardedDataset


class _Epochs:
    """Tells sharded data where epochs of training end. Mixed into Keras' adapters.

    Keras also reports ends that are none; and what evaluates or predicts must not change what comes next in
    training.
    """

    _begun = False
    _sharded: Any
    _training: bool

    def on_epoch_begin(self) -> None:
        """Begins an epoch."""
        if self._training:
            self._begun = True
            self._sharded.begin()
        super().on_epoch_begin()  # type: ignore[misc]

    def on_epoch_end(self) -> None:
        """Ends one that has begun."""
        super().on_epoch_end()  # type: ignore[misc]
        if self._begun:
            self._begun = False
            self._sharded.end()


class DatasetAdapter(_Epochs, PyDatasetAdapter):
    """Reads sharded arrays and PyDatasets.

    Args:
        data: What is read.
        sharded: What `hvd.shard` returned, which learns where epochs end.
        training: Whether `fit` trains on it.
    """

    def __init__(self, data: ShardedDataset, sharded: ShardedDataset, training: bool) -> None:
        self._sharded, self._training = sharded, training
        super().__init__(data, shuffle=False)

    def on_epoch_begin(self) -> None:
        """Lets a user's PyDataset prepare an epoch."""
        if not self._training:
            self._sharded.source.begin(self._sharded.position.epoch)
        super().on_epoch_begin()

    def _standardize_batch(self, batch: Any) -> Any:
        return batch  # x alone stays x, as from arrays


class TFAdapter(_Epochs, TFDatasetAdapter):
    """Reads sharded `tf.data.Dataset`s and generators.

    Args:
        data: What is read.
        sharded: What `hvd.shard` returned, which learns where epochs end.
        training: Whether `fit` trains on it.
        window: The `steps_per_epoch` of the `fit`, None for a whole epoch.
    """

    def __init__(self, data: Any, sharded: Any, training: bool, window: int | None) -> None:
        self._sharded, self._training, self._window = sharded, training, window
        super().__init__(data)

    @property
    def num_batches(self) -> int | None:
        """Steps of an epoch; None where only reading can tell."""
        if self._training:
            return self._window or self._sharded.num_batches
        return self._sharded.steps

    def on_epoch_end(self) -> None:
        """Goes on by as many steps as `fit` calls an epoch."""
        ended, window = self._begun, self._window
        if ended and window:
            self._begun = False
            self._sharded.position.advance(window, self._sharded.steps)
        super().on_epoch_end()


def untuned(get_iterated: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keep `tf.data` from tuning itself while Keras reads, so that an epoch starts without a pause.

    The tuning thread sleeps for 10 ms, then 20, 40, … up to a minute. Keras destroys an iterator once an epoch.
    That wakes the thread and only then marks it as cancelled (TensorFlow's `CancellationManager` runs its
    callbacks first), so a thread that looks in between sleeps on, and the destructor waits for it: for about as
    long as the epoch took. Without tuning, what has `num_parallel_calls=AUTOTUNE` makes as many calls at once as
    the rank has cores, 16 at most, and `prefetch(AUTOTUNE)` chooses its length by itself.

    Args:
        get_iterated: Keras' `TFEpochIterator._get_iterator`, which returns what is read from the beginning.
    """

    def get(self: Any) -> Any:
        dataset = get_iterated(self)
        if not isinstance(dataset, tf.data.Dataset) or dataset.options().autotune.enabled is not None:
            return dataset  # belongs to a tf.distribute strategy, or its user has decided
        options = tf.data.Options()
        options.autotune.enabled = False
        return dataset.with_options(options)

    return get
