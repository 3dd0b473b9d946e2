"""Loops of one's own with different numbers of batches: who has finished joins, and the others go on."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import BATCH, data, dense_model, gradients, mine

import hvdtrain.keras as hvd
from hvdtrain import runtime

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
def test_ranks_with_fewer_batches_let_the_others_finish(compiled, groups):
    engine = runtime.engine()
    model = dense_model("float32")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), groups=groups)
    optimizer.build(model.trainable_variables)
    x, y = data(engine.size + 1, "float32")

    def step(x, y):
        optimizer.apply(gradients(model, x, y))

    train = tf.function(step) if compiled else step
    for index in range(1 + engine.rank):
        train(tf.constant(mine(x)[index]), tf.constant(mine(y)[index]))
    assert engine.join() == engine.size - 1
    expected = reference(x, y, engine.size)
    hvd.broadcast_variables(model.weights, engine.size - 1)  # who joined last has seen every update
    for ours, theirs in zip(model.weights, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-4, atol=1e-5)


def reference(x, y, size):
    """The same on one process: a rank that has no batch left counts with a gradient of zero."""
    model = dense_model("float32")
    optimizer = keras.optimizers.SGD(0.1)
    for index in range(size):
        rows = [slice(rank * BATCH, (rank + 1) * BATCH) for rank in range(index, size)]
        each = [gradients(model, tf.constant(x[index][part]), tf.constant(y[index][part])) for part in rows]
        optimizer.apply([sum(parts) / size for parts in zip(*each, strict=True)], model.trainable_variables)
    return [np.asarray(weight) for weight in model.weights]


def test_sparse_gradients_go_on_too():
    engine = runtime.engine()
    table = keras.Variable(np.zeros((4, 2)), dtype="float32", name="table")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    optimizer.build([table])
    if engine.rank != 0 or engine.size == 1:
        values = tf.ones([1, 2])
        optimizer.apply([tf.IndexedSlices(values, tf.constant([2]), tf.constant([4, 2]))])
        expected = np.zeros((4, 2))
        expected[2] = max(engine.size - 1, 1) / engine.size
        np.testing.assert_allclose(-np.asarray(table), expected, rtol=1e-6)
    engine.join()
