"""An epoch starts without waiting for tf.data's tuning thread, whatever the data; the batches stay the same."""

import os
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator

import hvdtrain.keras as hvd

X = np.random.default_rng(0).standard_normal((12, 5)).astype("float32")
Y = X @ np.arange(5, dtype="float32")[:, None]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4]


def batches():
    while True:
        yield from (Batches()[index] for index in range(3))


def pipeline():
    samples = tf.data.Dataset.from_tensor_slices((X, Y)).map(
        lambda x, y: (2 * x, y), num_parallel_calls=tf.data.AUTOTUNE
    )
    return samples.batch(4).prefetch(tf.data.AUTOTUNE)


SOURCES = {
    "arrays": lambda: {"x": X, "y": Y, "batch_size": 4},
    "PyDataset": lambda: {"x": Batches()},
    "PyDataset with workers": lambda: {"x": Batches(workers=2)},
    "tf.data": lambda: {"x": pipeline()},
    "generator": lambda: {"x": batches(), "steps_per_epoch": 3},
    "sharded arrays": lambda: {"x": hvd.shard((X, Y), batch_size=4)},
    "sharded PyDataset": lambda: {"x": hvd.shard(Batches(), batch_size=4)},
    "sharded tf.data": lambda: {"x": hvd.shard(pipeline(), batch_size=4)},
    "sharded generator": lambda: {"x": hvd.shard(batches(), batch_size=4), "steps_per_epoch": 3},
}


def trained(source):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
    given = SOURCES[source]()
    steps = given.get("steps_per_epoch")
    validation = SOURCES[source]()
    data = (validation["x"], validation["y"]) if "y" in validation else validation["x"]
    model.fit(**given, validation_data=data, validation_steps=steps, epochs=2, verbose=0)
    model.evaluate(X, Y, batch_size=4, verbose=0)
    return model.get_weights()


@pytest.fixture
def read(monkeypatch):
    """The data sets that Keras has read from the beginning."""
    found, get = [], TFEpochIterator._get_iterator
    monkeypatch.setattr(TFEpochIterator, "_get_iterator", lambda self: found.append(get(self)) or found[-1])
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_no_data_set_that_fit_and_evaluate_read_tunes_itself(source, read, monkeypatch):
    weights = trained(source)
    assert len(read) >= 3  # training, validation, evaluate
    assert all(dataset.options().autotune.enabled is False for dataset in read)
    monkeypatch.setattr(
        TFEpochIterator, "_get_iterator", lambda self: self._distributed_dataset
    )  # as in plain Keras
    for ours, plain in zip(weights, trained(source), strict=True):
        np.testing.assert_array_equal(ours, plain)


def test_a_sharded_data_set_does_not_tune_itself_in_loops_of_ones_own():
    derived = hvd.shard(pipeline(), batch_size=4).map(lambda *batch: batch[0])
    assert derived.options().autotune.enabled is False


def test_who_asks_for_tuning_gets_it(read):
    options = tf.data.Options()
    options.autotune.enabled = True
    keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)]).predict(
        pipeline().with_options(options), verbose=0
    )
    assert {dataset.options().autotune.enabled for dataset in read} == {True}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core makes one call at a time")
def test_a_map_with_autotune_makes_several_calls_at_once(read):
    together = threading.Barrier(2)

    def wait(x):
        together.wait(60)  # broken if there is never a second call
        return x

    dataset = tf.data.Dataset.range(8).map(
        lambda x: tf.ensure_shape(tf.numpy_function(wait, [x], tf.int64), ()),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    iterator = TFEpochIterator(x=dataset.batch(4), distribute_strategy=tf.distribute.get_strategy())
    assert np.concatenate(list(iterator._get_iterator())).tolist() == list(range(8))
    assert read[0].options().autotune.enabled is False
