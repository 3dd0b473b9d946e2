"""jit_compile: forward and backward pass are one XLA program, and the ranks still train one model."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import (
    BATCH,
    CLASSES,
    FEATURES,
    alone,
    assert_identical,
    assert_same,
    data,
    dense_model,
    fit,
    mine,
    single,
)

import hvdtrain.keras as hvd

pytestmark = pytest.mark.ranks

SGD, Adam, layers = keras.optimizers.SGD, keras.optimizers.Adam, keras.layers


def programs(monkeypatch):
    """Notes what is compiled from now on."""
    compiled = []
    function = tf.function

    def noting(*args, **kwargs):
        if kwargs.get("jit_compile"):
            compiled.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(tf, "function", noting)
    return compiled


def layered():
    """A layer without gradient, and a loss that a layer adds."""
    init = keras.initializers.GlorotUniform(seed=3)
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(8, kernel_initializer=init, kernel_regularizer="l2")(inputs)
    x = layers.Add()([x, layers.Dense(8, kernel_initializer=init, trainable=False)(inputs)])
    return keras.Model(inputs, layers.Dense(CLASSES, kernel_initializer=init)(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make_model, dtype, rtol", [(dense_model, "float64", 1e-9), (layered, "float32", 1e-4)]
)
@pytest.mark.parametrize("make_optimizer", [lambda: SGD(0.1, momentum=0.9), lambda: Adam(0.01)])
def test_the_same_model_as_one_process(monkeypatch, make_model, make_optimizer, dtype, rtol):
    x, y = data(12, dtype)
    compiled = programs(monkeypatch)
    model = make_model()
    model.compile(hvd.DistributedOptimizer(make_optimizer()), "mse", metrics=["mae"], jit_compile=True)
    assert model.jit_compile
    fit(model, mine(x), mine(y), BATCH)
    assert compiled
    assert_same(model, alone(lambda: single(make_model(), make_optimizer(), x, y)), rtol=rtol)


def test_sparse_gradients_leave_the_program_sparse():
    init = keras.initializers.RandomUniform(seed=2)

    def make():
        return keras.Sequential(
            [
                keras.Input((5,), dtype="int32"),
                layers.Embedding(50, 4, embeddings_initializer=init, dtype="float64"),
                layers.Flatten(),
                layers.Dense(CLASSES, kernel_initializer=init, dtype="float64"),
            ]
        )

    words = np.random.default_rng(0).integers(50, size=(6, hvd.size() * BATCH, 5)).astype("int32")
    _, y = data(6)
    model = make()
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", jit_compile=True)
    fit(model, mine(words), mine(y), BATCH)
    assert_same(model, alone(lambda: single(make(), SGD(0.1), words, y)), rtol=1e-9)


@pytest.mark.parametrize("options", [{"steps_per_execution": 3}, {"auto_scale_loss": True}])
def test_with_what_else_compile_takes(options):
    x, y = data(6)
    model = dense_model()
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", jit_compile=True, **options)
    fit(model, mine(x), mine(y), BATCH)
    assert_same(model, alone(lambda: single(dense_model(), SGD(0.1), x, y)), rtol=1e-9)


def test_gradients_of_several_batches_are_added_up_outside():
    x, y = data(6)
    model = dense_model()
    optimizer = hvd.DistributedOptimizer(
        SGD(0.1), backward_passes_per_step=2, average_aggregated_gradients=True
    )
    model.compile(optimizer, "mse", jit_compile=True)
    fit(model, mine(x), mine(y), BATCH)
    joined = [each.reshape(3, -1, each.shape[-1]) for each in (x, y)]
    expected = alone(lambda: single(dense_model(), SGD(0.1), *joined, batch=2 * BATCH * hvd.size()))
    assert_same(model, expected, rtol=1e-9)


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    x, y = data(4, "float32")
    if hvd.rank() == hvd.size() - 1:
        x[1, :, 0] = np.inf
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = dense_model(dtype=None)
        model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", jit_compile=True)
    finally:
        keras.config.set_dtype_policy("float32")
    fit(model, mine(x), mine(y), BATCH)
    assert int(model.optimizer.inner_optimizer.iterations.numpy()) == 3
    assert all(np.isfinite(weight.numpy()).all() for weight in model.weights)
    assert_identical(model)


def test_batches_by_hand_and_what_does_not_train_work_too():
    x, y = data(4)
    model = dense_model()
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", metrics=["mae"], jit_compile=True)
    for batch_x, batch_y in zip(mine(x), mine(y), strict=True):
        model.train_on_batch(batch_x, batch_y)
    assert_same(model, alone(lambda: single(dense_model(), SGD(0.1), x, y)), rtol=1e-9)
    loss, mae = model.evaluate(x[0], y[0], verbose=0)
    predicted = model.predict(x[0], verbose=0)
    np.testing.assert_allclose(
        [loss, mae], [np.square(predicted - y[0]).mean(), np.abs(predicted - y[0]).mean()]
    )


def test_weights_that_differ_are_found_out():
    x, y = data(2)
    model = dense_model(seed=1 + hvd.rank())
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", jit_compile=True)
    if hvd.size() == 1:
        fit(model, mine(x), mine(y), BATCH)
        return
    with pytest.raises(Exception, match="do not hold the same weights"):
        fit(model, mine(x), mine(y), BATCH)


def test_a_train_step_of_ones_own_is_not_divided_and_one_line_says_so(capfd):
    class Own(keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    x, y = data(4)
    plain = dense_model()
    model = Own(plain.layers)
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", jit_compile=True)
    said = capfd.readouterr().err.count(
        "jit_compile is turned off for this model: Own defines its own train_step"
    )
    assert said == (1 if hvd.rank() == 0 and hvd.size() > 1 else 0)
    assert model.jit_compile == (hvd.size() == 1)
    fit(model, mine(x), mine(y), BATCH)
    assert_same(model, alone(lambda: single(dense_model(), SGD(0.1), x, y)), rtol=1e-9)


def test_a_layer_that_asks_other_ranks_turns_it_off_and_one_line_says_so(capfd):
    x, y = data(4)
    model = dense_model()
    model = keras.Sequential([*model.layers, hvd.SyncBatchNormalization(dtype="float64")])
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", jit_compile=True)
    fit(model, mine(x), mine(y), BATCH)
    said = capfd.readouterr().err.count(
        "jit_compile is turned off for this model: Sequential communicates with other ranks"
    )
    assert said == (1 if hvd.rank() == 0 and hvd.size() > 1 else 0)
    assert model.jit_compile == (hvd.size() == 1)
    assert_identical(model)


def test_steps_by_hand_make_no_program_each(monkeypatch):
    x, y = data(3)
    compiled = programs(monkeypatch)
    model = dense_model()
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", jit_compile=True)
    for batch_x, batch_y in zip(mine(x), mine(y), strict=True):
        model.train_step((tf.constant(batch_x), tf.constant(batch_y)))
    assert not compiled
    assert_same(model, alone(lambda: single(dense_model(), SGD(0.1), x, y)), rtol=1e-9)
