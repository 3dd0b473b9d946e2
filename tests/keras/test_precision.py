"""Mixed precision, and who turns XLA on: what Keras decides for one process is decided for all ranks together."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import BATCH, assert_identical, data, dense_model, fit, mine

import hvdtrain.keras as hvd

pytestmark = pytest.mark.ranks

SGD = keras.optimizers.SGD


@pytest.mark.parametrize("wrap", ["by compile", "inside", "outside"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(wrap):
    """By compile(), by a user who scales the distributed optimizer, and by one who distributes the scaled."""
    x, y = data(4, "float32")
    if hvd.rank() == hvd.size() - 1:
        x[1, :, 0] = np.inf  # this rank's second step
    scaled = keras.optimizers.LossScaleOptimizer
    optimizer = {
        "by compile": lambda: hvd.DistributedOptimizer(SGD(0.1)),
        "inside": lambda: scaled(hvd.DistributedOptimizer(SGD(0.1))),
        "outside": lambda: hvd.DistributedOptimizer(scaled(SGD(0.1))),
    }[wrap]()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = dense_model(dtype=None)
        model.compile(optimizer, "mse")
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, scaled)
    fit(model, mine(x), mine(y), BATCH)
    assert int(model.optimizer.inner_optimizer.iterations.numpy()) == 3
    assert float(model.optimizer.dynamic_scale.numpy()) == 2.0**14
    assert all(np.isfinite(weight.numpy()).all() for weight in model.weights)
    assert_identical(model)


def test_mixed_bfloat16_trains_the_same_model_everywhere():
    x, y = data(3, "float32")
    model = dense_model("mixed_bfloat16")
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse")
    before = model.layers[0].kernel.numpy()
    fit(model, mine(x), mine(y), BATCH)
    assert not np.array_equal(before, model.layers[0].kernel.numpy())
    assert_identical(model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_sixteen_bits(dtype):
    x, y = data(3, "float32")
    model = dense_model(dtype)
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse")
    fit(model, mine(x), mine(y), BATCH)
    assert_identical(model)


def test_auto_on_a_machine_with_a_gpu(monkeypatch):
    """TensorFlow here lists a GPU that the test made up; Keras then wants XLA by itself."""
    devices = [tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: devices)
    plain, distributed = dense_model(), dense_model()
    plain.compile(SGD(0.1), "mse")
    distributed.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse")
    assert plain.jit_compile and distributed.jit_compile


def test_plain_models_keep_xla_and_their_own_loss_scale():
    hvd.DistributedOptimizer(SGD(0.1))
    model = dense_model("float32")
    model.compile(SGD(0.1), "mse", jit_compile=True)
    assert model.jit_compile
    optimizer = keras.optimizers.LossScaleOptimizer(SGD(0.1))
    assert bool(optimizer.check_finite([tf.constant(1.0)]))


def test_float8_is_refused_in_a_sentence():
    variable = keras.Variable(np.ones(2, "float32"), name="scale")
    variable.overwrite_with_gradient = True
    with pytest.raises(NotImplementedError, match="mixed_bfloat16"):
        hvd.DistributedOptimizer(SGD(0.1)).apply([tf.ones(2)], [variable])
