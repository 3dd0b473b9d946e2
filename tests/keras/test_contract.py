"""N ranks with batch b learn what one process learns with batch N*b; every rank to the bit the same."""

import copy as copying
import functools

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
    flat,
    gradients,
    mine,
    single,
    twins,
)

import hvdtrain.keras as hvd

pytestmark = pytest.mark.ranks

optimizers = keras.optimizers
OPTIMIZERS = {
    "SGD": lambda: optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "Adam": lambda: optimizers.Adam(0.01),
    "AdamW": lambda: optimizers.AdamW(0.01, weight_decay=0.01),
    "RMSprop": lambda: optimizers.RMSprop(0.01, centered=True, momentum=0.5),
    "Adagrad": lambda: optimizers.Adagrad(0.05),
    "Lion": lambda: optimizers.Lion(0.003),
}


@pytest.fixture(autouse=True)
def float64():
    """Keras casts a model's input to its default float: in float32 the twins would part by rounding."""
    keras.backend.set_floatx("float64")
    yield
    keras.backend.set_floatx("float32")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * ("adam" not in name.lower())) for name in OPTIMIZERS],
)
def test_twenty_steps_in_float64(name):
    assert_same(*twins(dense_model, OPTIMIZERS[name]))


def test_twenty_steps_of_sgd_in_float32():
    keras.backend.set_floatx("float32")
    assert_same(*twins(lambda: dense_model("float32"), OPTIMIZERS["SGD"], dtype="float32"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(clipnorm=0.01),
        dict(global_clipnorm=0.02),
        dict(clipvalue=0.003),
        dict(weight_decay=0.05),
        dict(use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3),
        dict(loss_scale_factor=8.0),
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_optimizer_see_the_mean_gradient(options):
    make = functools.partial(optimizers.SGD, 0.1, **options)
    assert_same(*twins(dense_model, make, steps=6, run_eagerly="norm" in next(iter(options))))


def test_constraints():
    def make():
        return dense_model(kernel_constraint=keras.constraints.MaxNorm(0.7))

    assert_same(*twins(make, lambda: optimizers.SGD(0.5), steps=6))


def test_a_schedule_counts_the_same_steps():
    def schedule():
        return optimizers.schedules.ExponentialDecay(0.1, 3, 0.5, staircase=True)

    assert_same(*twins(dense_model, lambda: optimizers.SGD(schedule()), steps=8))


@pytest.mark.parametrize("run", ["eager", "steps_per_execution", "train_on_batch"])
def test_ways_of_running_a_step(run):
    options = {"eager": {"run_eagerly": True}, "steps_per_execution": {"steps_per_execution": 3}}.get(run, {})
    x, y = data(6)
    distributed = dense_model()
    distributed.compile(hvd.DistributedOptimizer(optimizers.Adam(0.01)), "mse", **options)
    if run == "train_on_batch":
        for step in range(6):
            distributed.train_on_batch(mine(x)[step], mine(y)[step])
    else:
        fit(distributed, mine(x), mine(y), BATCH)
    assert_same(distributed, alone(lambda: single(dense_model(), optimizers.Adam(0.01), x, y)))


class Custom(keras.Model):
    """A subclassed model with a train_step of its own, a shared layer, and a variable nobody uses."""

    def __init__(self):
        super().__init__()
        init = keras.initializers.GlorotUniform(seed=3)
        self.shared = keras.layers.Dense(FEATURES, "tanh", kernel_initializer=init, dtype="float64")
        self.head = keras.layers.Dense(CLASSES, kernel_initializer=init, dtype="float64")
        self.unused = self.add_weight(shape=(2,), name="unused", dtype="float64", initializer="ones")

    def call(self, x):
        return self.head(self.shared(self.shared(x)))

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x) - y))
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables, strict=True)
        )
        return {"loss": loss}


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_subclassed_model_with_its_own_step_shared_layers_and_a_variable_without_gradient():
    def make():
        model = Custom()
        model(np.zeros((1, FEATURES)))
        return model

    distributed, weights = twins(make, lambda: optimizers.SGD(0.1), steps=5)
    assert_same(distributed, weights)
    np.testing.assert_array_equal(distributed.unused.numpy(), np.ones(2))


@pytest.mark.parametrize("method", ["apply_gradients", "apply"])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_a_loop_of_ones_own(method, graph):
    x, y = data(4)
    distributed = dense_model()
    distributed.optimizer = hvd.DistributedOptimizer(optimizers.SGD(0.1, momentum=0.9))
    distributed.optimizer.build(distributed.trainable_variables)

    def step(x, y):
        grads, variables = gradients(distributed, x, y), distributed.trainable_variables
        if method == "apply":
            distributed.optimizer.apply(grads, variables)
        else:
            distributed.optimizer.apply_gradients(zip(grads, variables, strict=True))

    run = tf.function(step) if graph else step
    for index in range(4):
        run(tf.constant(mine(x)[index]), tf.constant(mine(y)[index]))
    assert_same(distributed, alone(lambda: single(dense_model(), optimizers.SGD(0.1, momentum=0.9), x, y)))


def test_gradient_accumulation_reduces_once_a_window(engine, monkeypatch):
    reductions = []
    if engine.size > 1:
        agree = engine.agree
        monkeypatch.setattr(
            engine,
            "agree",
            lambda call, *sizes: (
                reductions.append(call.kind.startswith("Distributed")),
                agree(call, *sizes),
            )[1],
        )
    make = lambda: optimizers.SGD(0.1, gradient_accumulation_steps=3)  # noqa: E731
    distributed, weights = twins(dense_model, make, steps=6)
    monkeypatch.undo()
    assert_same(distributed, weights)
    assert sum(reductions) == (2 if engine.size > 1 else 0)


def test_accumulated_steps_equal_one_large_batch():
    """Three steps of b on N ranks are one step of 3*N*b on one process."""
    x, y = data(3)
    distributed = dense_model()
    distributed.compile(hvd.DistributedOptimizer(optimizers.SGD(0.1, gradient_accumulation_steps=3)), "mse")
    fit(distributed, mine(x), mine(y), BATCH)
    whole = 3 * BATCH * hvd.size()
    assert_same(distributed, alone(lambda: single(dense_model(), optimizers.SGD(0.1), x, y, whole)))


def embedding_model():
    init = keras.initializers.RandomNormal(seed=5)
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(11, 4, embeddings_initializer=init, dtype="float64"),
            keras.layers.GlobalAveragePooling1D(dtype="float64"),
            keras.layers.Dense(CLASSES, kernel_initializer=init, dtype="float64"),
        ]
    )


def dense_first(kind):
    """Keras' Adam squares each row of a sparse gradient by itself, so a word seen twice counts otherwise."""

    class DenseFirst(kind):
        def apply(self, grads, trainable_variables=None):
            return super().apply([tf.convert_to_tensor(each) for each in grads], trainable_variables)

    return DenseFirst


@pytest.mark.slow
@pytest.mark.parametrize("sparse_as_dense", [False, True])
@pytest.mark.parametrize("kind", [optimizers.SGD, optimizers.Adam])
def test_embeddings(sparse_as_dense, kind):
    steps, size = 5, hvd.size()
    words = np.random.default_rng(0).integers(0, 11, (steps, size * BATCH, 5)).astype("int32")
    _, y = data(steps)
    distributed = embedding_model()
    distributed.compile(hvd.DistributedOptimizer(kind(0.01), sparse_as_dense=sparse_as_dense), "mse")
    fit(distributed, mine(words), mine(y), BATCH)
    reference = dense_first(kind) if sparse_as_dense else kind
    assert_same(distributed, alone(lambda: single(embedding_model(), reference(0.01), words, y)))


def test_a_layer_frozen_and_unfrozen_between_two_compiles():
    x, y = data(4)
    distributed = dense_model()
    for trainable in (False, True):
        distributed.layers[0].trainable = trainable
        distributed.compile(hvd.DistributedOptimizer(optimizers.Adam(0.01)), "mse")
        fit(distributed, mine(x), mine(y), BATCH)

    def train():
        model = dense_model()
        for trainable in (False, True):
            model.layers[0].trainable = trainable
            single(model, optimizers.Adam(0.01), x, y)
        return model

    assert_same(distributed, alone(train))


def test_two_optimizers_in_one_step():
    """As in a GAN: both reductions of one graph happen in the same order on all ranks."""
    x, y = data(4)
    first, second = dense_model(seed=1), dense_model(seed=2)
    pair = [hvd.DistributedOptimizer(optimizers.SGD(0.1, gradient_accumulation_steps=2)) for _ in range(2)]
    for optimizer, model in zip(pair, (first, second), strict=True):
        optimizer.build(model.trainable_variables)
        model.optimizer = optimizer

    @tf.function
    def step(x, y):
        for optimizer, model in zip(pair, (first, second), strict=True):
            optimizer.apply_gradients(zip(gradients(model, x, y), model.trainable_variables, strict=True))

    for index in range(4):
        step(tf.constant(mine(x)[index]), tf.constant(mine(y)[index]))
    assert_identical(first)
    assert_identical(second)


def test_sum_instead_of_average():
    x, y = data(1)
    distributed = dense_model()
    distributed.compile(hvd.DistributedOptimizer(optimizers.SGD(0.1), op=hvd.Sum), "mse")
    fit(distributed, mine(x), mine(y), BATCH)
    assert_same(distributed, alone(lambda: single(dense_model(), optimizers.SGD(0.1 * hvd.size()), x, y)))


def test_the_users_optimizer_stays_plain_and_its_state_comes_along():
    x, y = data(4)
    before = dense_model()
    before.compile(optimizers.Adam(0.01), "mse")
    fit(before, x[:2], y[:2], BATCH * hvd.size())
    plain = before.optimizer
    distributed = hvd.DistributedOptimizer(plain)
    assert distributed is not plain
    assert type(distributed).__name__ == "Adam" and isinstance(distributed, optimizers.Adam)
    for ours, theirs in zip(distributed.variables, plain.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert distributed.get_config() == plain.get_config()


def test_what_was_set_after_construction_comes_along():
    def make():
        optimizer = optimizers.AdamW(0.01, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return optimizer

    assert_same(*twins(dense_model, make, steps=4, run_eagerly=True))


class WithoutConfig(optimizers.SGD):
    """A user's optimizer that forgot get_config: its copy would have the default power."""

    def __init__(self, learning_rate=0.1, power=1.0):
        super().__init__(learning_rate)
        self.power = power

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient * self.power, variable, learning_rate)

    def get_config(self):
        return {"learning_rate": float(self.learning_rate)}


def test_an_argument_that_get_config_forgets_comes_along():
    assert_same(*twins(dense_model, lambda: WithoutConfig(power=3.0), steps=4, run_eagerly=True))


class AppliesByItself(optimizers.SGD):
    def apply(self, grads, trainable_variables=None):
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            variable.assign_sub(0.1 * gradient)


class AppliesGradientsByItself(optimizers.SGD):
    def apply_gradients(self, grads_and_vars):
        for gradient, variable in grads_and_vars:
            variable.assign_sub(0.1 * gradient)


@pytest.mark.parametrize("kind", [AppliesByItself, AppliesGradientsByItself])
@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
def test_an_optimizer_that_goes_around_the_average_is_refused(kind, eager):
    x, y = data(1)
    model = dense_model()
    model.compile(hvd.DistributedOptimizer(kind(0.1)), "mse", run_eagerly=eager)
    if hvd.size() == 1:
        fit(model, mine(x), mine(y), BATCH)
    else:
        with pytest.raises(NotImplementedError, match="not averaged over the ranks"):
            fit(model, mine(x), mine(y), BATCH)


def test_a_deep_copy_stays_distributed():
    built = hvd.DistributedOptimizer(optimizers.Adam(0.01))
    built.build(dense_model().trainable_variables)
    for original in (hvd.DistributedOptimizer(optimizers.Adam(0.01)), built):
        copy = copying.deepcopy(original)
        assert type(copy) is type(original) and copy is not original
        assert copy.get_config() == original.get_config() and copy.built == original.built


def test_a_callable_or_unregistered_schedule_survives_the_copy():
    class Mine(optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.25

    for rate in (Mine(), lambda: 0.25):
        assert float(hvd.DistributedOptimizer(optimizers.SGD(rate)).learning_rate) == 0.25


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: hvd.DistributedOptimizer("adam"), TypeError, "keras.optimizers.Adam"),
        (
            lambda: hvd.DistributedOptimizer(hvd.DistributedOptimizer(optimizers.SGD(0.1))),
            ValueError,
            "already",
        ),
        (lambda: hvd.DistributedOptimizer(optimizers.SGD(0.1), op=hvd.Max), ValueError, "hvd.Sum"),
    ],
)
def test_what_cannot_be_wrapped_is_said(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_flat_keeps_the_order_of_steps():
    x, _ = data(3)
    np.testing.assert_array_equal(
        flat(mine(x))[BATCH : 2 * BATCH], x[1, hvd.rank() * BATCH : (hvd.rank() + 1) * BATCH]
    )


def test_a_rank_that_built_another_model_before_still_trains_the_same_one():
    """Keras numbers its layers as they are made, so this rank's are called otherwise."""
    if hvd.rank() == 0:
        dense_model()
    distributed, weights = twins(dense_model, lambda: optimizers.SGD(0.1), steps=2)
    assert_same(distributed, weights)
