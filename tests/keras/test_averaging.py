"""Ranks that train by themselves between two averages of their weights, against NumPy and plain Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import StopAt, StoppedError

import hvdtrain.keras as hvd
from hvdtrain import runtime
from hvdtrain.keras.optimizer import averaging

pytestmark = pytest.mark.ranks

SGD = keras.optimizers.SGD
RATE = 0.1


@pytest.fixture(autouse=True)
def float64():
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


def target(rank):
    return np.random.default_rng(rank).standard_normal((4, 3))


def train(optimizer, steps, way="graph"):
    """Lets each rank pull a variable towards a point of its own; yields its value after each step."""
    variable = keras.Variable(np.ones((4, 3)), dtype="float64", name="kernel")

    def step():
        optimizer.apply([variable.value - target(hvd.rank())], [variable])

    run = step if way == "eager" else tf.function(step)
    for _ in range(steps):
        run()
        yield variable.numpy()


def expected(steps, every, start_after=0, outer=(1.0, 0.0), groups=None):
    """The values of all ranks after each step, computed by one process: SGD within, SGD with Nesterov between."""
    rate, momentum = outer[0], float(np.float32(outer[1]))  # Keras rounds the momentum to float32
    groups = groups or [[rank] for rank in range(hvd.size())]
    targets = [target(rank) for rank in range(hvd.size())]
    values, common, velocity, since = [np.ones((4, 3))] * hvd.size(), np.ones((4, 3)), 0, 0
    for step in range(steps):
        gradients = [value - goal for value, goal in zip(values, targets, strict=True)]
        together = groups if step >= start_after else [range(hvd.size())]
        for group in together:
            mean = np.mean([gradients[rank] for rank in group], axis=0)
            for rank in group:
                values[rank] = values[rank] - RATE * mean
        since += step >= start_after
        if step < start_after:
            common = values[0]
        if since == every:
            change = common - np.mean(values, axis=0)
            velocity = momentum * velocity - rate * change
            common = common + (momentum * velocity - rate * change if momentum else velocity)
            values, since = [common] * hvd.size(), 0
        yield values[hvd.rank()]


def assert_values(optimizer, steps, way="graph", **asked):
    for value, wanted in zip(train(optimizer, steps, way), expected(steps, **asked), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["eager", "graph", "during backprop"], indirect=True)
@pytest.mark.parametrize(("every", "start_after"), [(1, 0), (3, 0), (3, 2)])
def test_local_sgd(engine, way, every, start_after):
    optimizer = hvd.LocalSGD(SGD(RATE), every, start_after)
    assert_values(optimizer, 8, way, every=every, start_after=start_after)
    optimizer.average_weights()


@pytest.mark.parametrize("way", ["eager", "graph"], indirect=True)
def test_diloco(engine, way):
    if engine.size == 1:
        pytest.skip("one process trains as without")
    assert_values(hvd.DiLoCo(SGD(RATE), every=2), 9, way, every=2, outer=(0.7, 0.9))
    assert_values(
        hvd.DiLoCo(SGD(RATE), SGD(0.5), every=2, start_after=3),
        9,
        way,
        every=2,
        start_after=3,
        outer=(0.5, 0.0),
    )


def test_one_process_trains_as_without(engine):
    if engine.size > 1:
        pytest.skip("for one rank")
    values = [*train(hvd.DiLoCo(SGD(RATE), every=2), 5)]
    np.testing.assert_array_equal(values, [*train(SGD(RATE), 5)])


def test_within_a_host_each_step_is_common(engine, monkeypatch):
    if engine.size != 4:
        pytest.skip("needs four ranks")
    monkeypatch.setattr(averaging.platform, "node", lambda: f"host{hvd.rank() % 2}")
    groups = [[0, 2], [1, 3]]
    assert_values(hvd.LocalSGD(SGD(RATE), 3, between="hosts"), 8, every=3, groups=groups)
    assert_values(hvd.LocalSGD(SGD(RATE), 3, 2, between="hosts"), 8, every=3, start_after=2, groups=groups)


def test_all_ranks_on_one_host_is_said(engine, capfd):
    if engine.size == 1:
        pytest.skip("needs several ranks")
    assert_values(hvd.LocalSGD(SGD(RATE), 3, between="hosts"), 4, every=3, groups=[range(hvd.size())])
    assert ("all ranks are on one host" in capfd.readouterr().err) is (hvd.rank() == 0)


def test_changes_can_be_compressed(engine):
    if engine.size == 1:
        pytest.skip("one rank has nothing to send")
    compression = hvd.Compression.topk(0.25, min_size=2)
    (last,) = [*train(hvd.LocalSGD(SGD(RATE), 1, compression=compression), 400)][-1:]
    np.testing.assert_allclose(last, np.mean([target(rank) for rank in range(hvd.size())], axis=0), atol=0.15)
    exact = [*train(hvd.LocalSGD(SGD(RATE), 2, compression=hvd.Compression.int8(block=32, min_size=2)), 2)][
        -1
    ]
    np.testing.assert_allclose(exact, [*expected(2, 2)][-1], atol=0.01)


def test_variables_of_each_rank_stay_its_own(engine):
    if engine.size == 1:
        pytest.skip("needs several ranks")
    variables = [keras.Variable(np.ones(3), name=name) for name in ("common", "own")]
    optimizer = hvd.LocalSGD(SGD(RATE), every=2)
    optimizer.build(variables)
    optimizer.build(variables)  # as Keras' own, it does nothing
    optimizer.register_local_var(variables[1])
    for _ in range(2):
        optimizer.apply([variable.value * (1 + hvd.rank()) for variable in variables], variables)
    both = hvd.allgather_object([variable.numpy().tolist() for variable in variables])
    assert len({str(common) for common, _ in both}) == 1 and len({str(own) for _, own in both}) == hvd.size()


def data(rows=44):
    x = np.random.default_rng(1).standard_normal((rows, 5))
    return x, x.sum(axis=1, keepdims=True)


def compiled(optimizer, seed=3):
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model


def fit(model, callbacks=(), epochs=3, **asked):
    samples, held_out = hvd.shard(data(), 8), hvd.shard(data(20), 8, shuffle=False)
    callbacks = hvd.callbacks.distributed([*callbacks])
    return model.fit(
        samples, validation_data=held_out, epochs=epochs, verbose=0, callbacks=callbacks, **asked
    )


def weights(model):
    return [weight.numpy() for weight in model.weights]


def assert_the_same(one, other, atol=0.0):
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("eagerly", [False, True], ids=["graph", "eager"])
def test_averages_after_each_step_are_what_one_process_learns(engine, eagerly):
    plain = compiled(SGD(RATE))
    plain.fit(*data(), batch_size=8, epochs=2, verbose=0, shuffle=False)
    model = compiled(hvd.LocalSGD(SGD(RATE), every=1))
    model.run_eagerly = eagerly
    model.fit(hvd.shard(data(), 8, shuffle=False), epochs=2, verbose=0)
    assert_the_same(weights(model), weights(plain), 1e-12)


class Seen(keras.callbacks.Callback):
    """Records the weights at each moment of `fit`."""

    def __init__(self):
        super().__init__()
        self.steps, self.tests, self.epochs = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(self._digest())

    def on_test_begin(self, logs=None):
        self.tests.append(self._digest())

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(self._digest())

    def _digest(self):
        return b"".join(weight.tobytes() for weight in weights(self.model))


@pytest.mark.slow
@pytest.mark.parametrize("loss_scale", [False, True], ids=["", "with a loss scale"])
def test_callbacks_and_validation_see_the_average(engine, loss_scale):
    if engine.size == 1:
        pytest.skip("needs several ranks")
    inner = keras.optimizers.LossScaleOptimizer(SGD(RATE)) if loss_scale else SGD(RATE)
    seen, model = Seen(), compiled(hvd.LocalSGD(inner, every=4))
    history = fit(model, [seen, keras.callbacks.EarlyStopping("val_loss", patience=1)])
    of_all = hvd.allgather_object((seen.steps, seen.tests, seen.epochs, history.history))
    steps = [len({each[0][step] for each in of_all}) for step in range(6)]  # 6 steps an epoch
    assert steps == [hvd.size()] * 3 + [1] + [hvd.size()] * 2
    assert all(other[1:] == of_all[0][1:] for other in of_all)
    evaluated = hvd.evaluate(model, *data(20), batch_size=8, verbose=0)
    assert evaluated == pytest.approx(history.history["val_loss"][-1], rel=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: hvd.LocalSGD(
            keras.optimizers.Adam(0.01), every=4, compression=hvd.Compression.topk(0.2, min_size=2)
        ),
        lambda: hvd.DiLoCo(keras.optimizers.AdamW(0.01), every=5, start_after=3),
    ],
    ids=["LocalSGD", "DiLoCo"],
)
def test_a_training_that_was_stopped_between_two_averages_ends_as_one_that_was_not(engine, folder, make):
    for step in (2, 9):
        with pytest.raises(StoppedError):
            fit(compiled(make()), [StopAt(step), hvd.callbacks.Checkpoint(folder, every_steps=1)])
    resumed, whole = compiled(make()), compiled(make())
    again = fit(resumed, [hvd.callbacks.Checkpoint(folder)])
    undisturbed = fit(whole)
    assert_the_same(weights(resumed), weights(whole))
    assert_the_same(*([each.numpy() for each in model.optimizer.variables] for model in (resumed, whole)))
    assert again.history == undisturbed.history


@pytest.mark.slow
def test_the_file_is_keras_own(engine, tmp_path):
    model = compiled(hvd.DiLoCo(keras.optimizers.Adam(0.01), every=3))
    fit(model, epochs=1)
    if hvd.rank() == 0:
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert type(loaded.optimizer) is keras.optimizers.Adam
        assert_the_same(weights(loaded), weights(model))


@pytest.mark.slow
def test_weights_set_between_two_trainings_are_taken(engine):
    model = compiled(hvd.DiLoCo(SGD(0.0), SGD(1.0), every=4))
    fit(model, epochs=1)
    model.set_weights([np.full(weight.shape, 2.0) for weight in model.weights])
    fit(model, epochs=1)
    for weight in weights(model):
        np.testing.assert_array_equal(weight, 2.0)


def test_the_first_average_is_verified(engine, capfd):
    if engine.size == 1:
        pytest.skip("one rank agrees with itself")
    [*train(hvd.LocalSGD(SGD(RATE), every=2), 4)]
    said = "verified at average 1: 1 variables are the same on all"
    text = capfd.readouterr().err
    assert (said in text and "is the average of all ranks' changes of the weights" in text) is (
        hvd.rank() == 0
    )


def test_ranks_that_average_at_different_steps_are_told(engine):
    if engine.size == 1:
        pytest.skip("one rank agrees with itself")
    with pytest.raises((hvd.MismatchError, tf.errors.OpError)) as error:
        fit(compiled(hvd.LocalSGD(SGD(RATE), every=4 if hvd.rank() else 3)), epochs=1)
    text = (
        str(error.value) if isinstance(error.value, hvd.MismatchError) else str(runtime.engine().last_error)
    )
    assert "every-3" in text and "every-4" in text


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (
            lambda: hvd.LocalSGD(SGD(), every=0),
            ValueError,
            "LocalSGD: every is a number of steps of at least 1",
        ),
        (lambda: hvd.DiLoCo(SGD(), every=2.5), ValueError, "DiLoCo: every is .* Received: every=2.5"),
        (
            lambda: hvd.LocalSGD(SGD(), start_after=-1),
            ValueError,
            "start_after is a number of steps of at least 0",
        ),
        (lambda: hvd.LocalSGD(SGD(), between="racks"), ValueError, 'must be "ranks" or "hosts"'),
        (lambda: hvd.LocalSGD("sgd"), TypeError, "LocalSGD takes an instance of keras.optimizers.Optimizer"),
        (
            lambda: hvd.DiLoCo(SGD(), outer=0.7),
            TypeError,
            "outer takes an instance of keras.optimizers.Optimizer",
        ),
        (lambda: hvd.LocalSGD(hvd.DistributedOptimizer(SGD())), ValueError, "distributed already"),
        (lambda: hvd.DistributedOptimizer(hvd.LocalSGD(SGD())), ValueError, "distributed already"),
        (lambda: hvd.LocalSGD(SGD(use_ema=True)), ValueError, "use_ema=True replaces the weights"),
        (lambda: hvd.LocalSGD(SGD(), compression="int8"), TypeError, "compression is hvd.Compression.none"),
    ],
)
def test_arguments_that_mean_nothing(engine, make, kind, words):
    with pytest.raises(kind, match=words):
        make()


@pytest.mark.slow
def test_an_optimizer_with_a_state_and_a_loss_scale(engine):
    model = compiled(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)))
    model.optimizer.build(model.trainable_variables)
    model.compile(hvd.LocalSGD(model.optimizer, every=2), "mse")
    fit(model, epochs=1)
    assert len(set(hvd.allgather_object(str(weights(model))))) == 1


def test_elastic_states_refuse_it(engine):
    model = compiled(hvd.LocalSGD(SGD(RATE)))
    with pytest.raises(ValueError, match="does not keep what LocalSGD and DiLoCo need"):
        hvd.elastic.KerasState(model)
