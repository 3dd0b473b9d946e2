"""A user who does not shard is told so, once; the data passes by untouched."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.keras as hvd
from hvdtrain.data import shard
from hvdtrain.data.fingerprint import Fingerprint, digest, verdict

pytestmark = pytest.mark.ranks

X, Y = np.random.default_rng(0).standard_normal((32, 4)).astype("float32"), np.zeros(32)


def fitted(data, **options):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse", run_eagerly=True)
    hvd.broadcast_variables(model.weights)
    model.fit(data, verbose=0, **options)


def told(capfd):
    """How often this rank has said that all ranks train on the same data, and with what explanation."""
    said = capfd.readouterr().err
    return said.count("every rank trains on the same data"), said


def generator():
    for step in range(4):
        yield X[step * 8 : (step + 1) * 8], Y[step * 8 : (step + 1) * 8]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return X[index * 8 : (index + 1) * 8], Y[index * 8 : (index + 1) * 8]


def slices():
    return tf.data.Dataset.from_tensor_slices((X, Y))


KINDS = {
    "arrays": lambda: (X, {"y": Y, "batch_size": 8, "shuffle": False}),
    "dataset": lambda: (slices().batch(8), {}),
    "generator": lambda: (generator(), {}),
    "PyDataset": lambda: (Batches(), {"shuffle": False}),
    "a share of the steps": lambda: (slices().repeat().batch(8), {"steps_per_epoch": 4 // hvd.size()}),
}
SHUFFLED = {
    "arrays": lambda: (X, {"y": Y, "batch_size": 8}),
    "dataset": lambda: (slices().shuffle(32, seed=hvd.rank() + 1).batch(8), {}),
    "PyDataset": lambda: (Batches(), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_data_is_noticed_once(kind, capfd):
    data, options = KINDS[kind]()
    fitted(data, epochs=1 if kind == "generator" else 2, **options)
    times, said = told(capfd)
    assert times == (hvd.size() > 1 and hvd.rank() == 0)
    assert not times or "learn no more than one. Type: model.fit(hvd.shard(" in said


@pytest.mark.parametrize("kind", SHUFFLED)
def test_equal_data_in_other_orders_is_noticed_too(kind, capfd):
    keras.utils.set_random_seed(hvd.rank())
    data, options = SHUFFLED[kind]()
    fitted(data, epochs=2, **options)
    times, said = told(capfd)
    assert times == (hvd.size() > 1 and hvd.rank() == 0)
    assert not times or "in its own order" in said


PARTS = {
    "arrays": lambda rank: (X + rank, {"y": Y, "batch_size": 8}),
    "one validation for all": lambda rank: (X + rank, {"y": Y, "validation_data": (X, Y)}),
    "shard": lambda rank: (shard((X, Y), 8), {}),
    "a sharded dataset": lambda rank: (slices().shuffle(32, seed=1).shard(hvd.size(), rank).batch(4), {}),
    "random draws": lambda rank: (
        slices().repeat().shuffle(32, seed=rank + 1).batch(8),
        {"steps_per_epoch": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PARTS)
def test_ranks_with_their_own_part_hear_nothing(kind, capfd):
    if hvd.size() > 1:
        data, options = PARTS[kind](hvd.rank())
        fitted(data, **options)
        assert told(capfd)[0] == 0


def test_an_epoch_of_one_batch_is_compared_too(capfd):
    fitted(X, y=Y, batch_size=32)
    assert told(capfd)[0] == (hvd.size() > 1 and hvd.rank() == 0)


def test_a_model_that_is_not_distributed_is_left_alone(capfd):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    if hvd.rank() == 0:
        model.fit(X, Y, verbose=0)
    assert told(capfd)[0] == 0


def test_nothing_is_consumed_or_changed_on_the_way_to_the_model():
    drawn = []

    def numbers():
        for number in range(5):
            drawn.append(number)
            yield np.full((2, 3), number)

    dataset = tf.data.Dataset.from_generator(numbers, output_signature=tf.TensorSpec((None, 3), tf.int64))
    fingerprint = Fingerprint()
    watched = fingerprint.over(dataset)
    assert fingerprint.value() is None and drawn == []
    assert [int(each[0, 0]) for each in watched] == [0, 1, 2, 3, 4] and drawn == [0, 1, 2, 3, 4]
    once = fingerprint.value()
    assert [int(each[0, 0]) for each in watched] == [0, 1, 2, 3, 4] and fingerprint.value() == once
    assert watched.element_spec == dataset.element_spec
    known = tf.data.Dataset.range(6).batch(2)
    assert int(Fingerprint().over(known).cardinality()) == 3


def test_nested_ragged_and_text_inputs_have_fingerprints():
    ragged = tf.data.Dataset.from_tensors(
        {"a": tf.ragged.constant([[1, 2], [3]]), "b": tf.constant(["x", "y"])}
    )
    one, other = Fingerprint(), Fingerprint()
    list(one.over(ragged))
    list(
        other.over(
            tf.data.Dataset.from_tensors({"a": tf.ragged.constant([[1, 2, 3]]), "b": tf.constant(["x"])})
        )
    )
    assert one.value() and other.value() and one.value() != other.value()


def test_a_verdict_needs_all_ranks_to_be_equal():
    assert "all 3 ranks" in verdict([7, 7, 7])
    assert verdict([7, 7, 8]) is verdict([None, None]) is verdict([7]) is None
    assert digest({"a": X}) == digest({"a": X.copy()}) != digest({"a": X[::-1]})
    assert digest(X) != digest(X.reshape(4, 32))
