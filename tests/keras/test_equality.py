"""Variables that nobody averages: named where the ranks hold different values, and no false alarm elsewhere."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.keras as hvd
from hvdtrain.gradients import divergence
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.tensorflow import DistributedGradientTape

pytestmark = pytest.mark.ranks

SGD = keras.optimizers.SGD


@pytest.fixture(autouse=True)
def several(engine):
    if engine.size == 1:
        pytest.skip("one rank has nothing to differ from")


class Halves(keras.Model):
    """Two networks with an optimizer each, as in a GAN."""

    def __init__(self, *between):
        super().__init__()
        self.body = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(3, name="inner"), *between], name="body"
        )
        self.head = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="outer")], name="head")

    def compile(self, body_optimizer, head_optimizer, **options):
        super().compile(**options)
        self.body_optimizer, self.optimizer = body_optimizer, head_optimizer

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean((self.head(self.body(x, training=True)) - y) ** 2)
        for optimizer, part in ((self.body_optimizer, self.body), (self.optimizer, self.head)):
            variables = part.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {"loss": loss}


def fit(model, same=False, epochs=2, callbacks=()):
    x = np.random.default_rng(0 if same else hvd.rank()).normal(size=(8, 4)).astype("float32")
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    return model.fit(x, x[:, :1], epochs=epochs, shuffle=False, verbose=0, callbacks=[broadcast, *callbacks])


def mismatch(function):
    """Runs what must raise on every rank; returns the message, the same on all."""
    with pytest.raises(hvd.MismatchError) as caught:
        function()
    texts = hvd.allgather_object(str(caught.value))
    assert len(set(texts)) == 1
    return texts[0]


def half(**options):
    model = Halves(**options)
    model.compile(SGD(0.1), hvd.DistributedOptimizer(SGD(0.1)))
    return model


@pytest.mark.parametrize("epochs, when", [(3, "after epoch 1"), (1, "at the end of model.fit")])
def test_a_second_optimizer_that_is_not_distributed(epochs, when):
    said = mismatch(lambda: fit(half(), epochs=epochs))
    assert "body/inner/kernel on rank 1" in said and when in said, said
    assert "(SGD)" in said and "hvd.DistributedOptimizer" in said and "register_local_var" in said
    assert "head" not in said


def test_two_distributed_optimizers_are_right_and_nothing_is_said(capfd):
    model = Halves(keras.layers.BatchNormalization(), keras.layers.Dropout(0.2))
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), hvd.DistributedOptimizer(SGD(0.1)))
    fit(model)
    moving = hvd.allgather_object(model.body.layers[1].moving_mean.numpy().tolist())
    assert moving[0] != moving[1]  # each rank's own, and no error
    divergence.compare_at_end(hvd_engine())
    assert "warning" not in capfd.readouterr().err


def test_equal_variables_that_nobody_averages_are_named_once(capfd):
    model = half()
    fit(model, same=True, epochs=3)
    fit(model, same=True, epochs=3)
    said = capfd.readouterr().err
    assert said.count("warning: the gradients of body/inner/kernel, body/inner/bias are not averaged") == (
        hvd.rank() == 0
    ), said


def test_local_variables_may_differ(capfd):
    model = half()
    for variable in model.body.trainable_variables:
        model.optimizer.register_local_var(variable)
    fit(model)
    kernels = hvd.allgather_object(model.body.weights[0].numpy().tolist())
    assert kernels[0] != kernels[1]
    assert "warning" not in capfd.readouterr().err


def test_local_layers_may_differ_also_while_frozen(capfd):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.layers[0].kernel.assign(model.layers[0].kernel + float(hvd.rank()))
    model.layers[0].trainable = False
    local = model.layers[0]
    model.compile(hvd.PartialDistributedOptimizer(SGD(0.1), local_layers=local), "mse")
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=local.weights)
    x = np.ones((8, 4), "float32")
    model.fit(x, x[:, :1], epochs=2, verbose=0, callbacks=[broadcast])
    assert "differ" not in capfd.readouterr().err


def test_a_frozen_layer_that_differs_is_found_before_it_is_unfrozen():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="frozen"), keras.layers.Dense(1)])
    keras.utils.set_random_seed(0)
    for weight in model.weights:
        weight.assign(np.ones(weight.shape))
    model.layers[0].kernel.assign(model.layers[0].kernel + float(hvd.rank()))
    model.layers[0].trainable = False
    model.compile(hvd.DistributedOptimizer(SGD(0.01)), "mse")
    x = np.ones((8, 4), "float32")
    said = mismatch(lambda: model.fit(x, x[:, :1], epochs=1, verbose=0))
    assert "frozen/kernel" in said and "something updates" in said


def test_a_plain_optimizer_beside_a_broadcast():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(SGD(0.1), "mse")
    fit(model)  # it was said at the beginning that each rank trains a model of its own
    assert "dense/kernel" in mismatch(lambda: divergence.compare_at_end(hvd_engine()))


def test_what_one_rank_loads_after_fit_is_its_own_business(capfd):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse")

    class Restore(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            model.set_weights([weight + 1 for weight in model.get_weights()])

    fit(model, callbacks=[Restore()] if hvd.rank() == 0 else [])
    divergence.compare_at_end(hvd_engine())
    assert "warning" not in capfd.readouterr().err


def hvd_engine():
    from hvdtrain import runtime

    return runtime.engine()


def loop(body_tape, steps=3, compiled=True, seed=0):
    """Trains two networks in a hand-written loop; returns them."""
    init = keras.initializers.GlorotUniform(seed=seed)
    body = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_initializer=init)], name="body")
    head = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer=init)], name="head")
    body_optimizer, head_optimizer = SGD(0.1), SGD(0.1)
    x = tf.constant(np.random.default_rng(hvd.rank()).normal(size=(8, 4)), tf.float32)

    def step():
        with tf.GradientTape() as first, tf.GradientTape() as second:
            loss = tf.reduce_mean((head(body(x)) - x[:, :1]) ** 2)
        ours = body_tape(first).gradient(loss, body.trainable_variables)
        theirs = DistributedGradientTape(second).gradient(loss, head.trainable_variables)
        body_optimizer.apply_gradients(zip(ours, body.trainable_variables, strict=True))
        head_optimizer.apply_gradients(zip(theirs, head.trainable_variables, strict=True))

    run = tf.function(step) if compiled else step
    for _ in range(steps):
        run()
    return body, head


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False], ids=["graph", "eager"])
def test_a_forgotten_tape_in_a_loop_is_found_at_the_end(compiled):
    kept = loop(lambda tape: tape, compiled=compiled)
    said = mismatch(lambda: divergence.compare_at_end(hvd_engine()))
    assert (
        "body/dense" in said
        and "at the end of the script" in said
        and kept[0].name not in said.split(".")[-1]
    )


def test_a_loop_with_both_tapes_ends_in_silence(capfd):
    kept = loop(DistributedGradientTape)
    divergence.compare_at_end(hvd_engine())
    assert kept and "warning" not in capfd.readouterr().err


def test_one_rank_that_restores_a_checkpoint_after_a_loop_is_only_told(capfd):
    kept = loop(DistributedGradientTape)
    if hvd.rank() == 0:
        for variable in (*kept[0].weights, *kept[1].weights):
            variable.assign(variable + 1.0)
    divergence.compare_at_end(hvd_engine())
    assert ("If one rank has loaded other values since" in capfd.readouterr().err) == (hvd.rank() == 0)


def test_a_model_that_differs_from_the_start_is_refused_at_the_tenth_step():
    with pytest.raises((hvd.MismatchError, tf.errors.OpError)):
        loop(DistributedGradientTape, steps=10, seed=hvd.rank(), compiled=False)


def test_models_that_each_rank_trains_for_itself_are_only_told(capfd):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(SGD(0.1), "mse")
    x = np.random.default_rng(hvd.rank()).normal(size=(8, 4))
    model.fit(x, x[:, :1], verbose=0)
    divergence.compare_at_end(hvd_engine())
    assert ("If each rank is to train its own, all is well" in capfd.readouterr().err) == (hvd.rank() == 0)


def test_a_model_of_one_rank_concerns_nobody(capfd):
    kept = loop(DistributedGradientTape)
    if hvd.rank() == 0:
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(SGD(0.1), "mse")
        model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
    divergence.compare_at_end(hvd_engine())
    assert kept and "warning" not in capfd.readouterr().err


def test_rounding_on_another_cpu_ends_no_job(capfd):
    kept = loop(DistributedGradientTape)
    registry.find(kept[0].weights[0]).verified = False
    if hvd.rank() == 0:
        kept[0].weights[0].assign(kept[0].weights[0] * (1 + 1e-6))
    divergence.compare_at_end(hvd_engine())
    assert ("body/dense" in capfd.readouterr().err) == (hvd.rank() == 0)


def test_off_compares_nothing(monkeypatch):
    monkeypatch.setenv("HVDTRAIN_VERIFY", "off")
    fit(half())
    divergence.compare_at_end(hvd_engine())
