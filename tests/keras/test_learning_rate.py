"""Schedules and warm-up: the rates that are documented, and a velocity that keeps its worth."""

import keras
import numpy as np
import pytest
from twins import BATCH, assert_identical, data, dense_model, fit, flat, mine

import hvdtrain.keras as hvd

pytestmark = pytest.mark.ranks

SGD = keras.optimizers.SGD
Schedule = hvd.callbacks.LearningRateScheduleCallback
Warmup = hvd.callbacks.LearningRateWarmupCallback
STEPS = 4


class Rates(keras.callbacks.Callback):
    """Notes the rate with which each batch is about to be trained."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_begin(self, batch, logs=None):
        self.seen.append(float(self.model.optimizer.learning_rate))


def rates(*callbacks, epochs=3, optimizer=None, **options):
    """Trains STEPS batches an epoch; returns the rate of each batch and the history."""
    x, y = data(STEPS, "float32")
    model = dense_model("float32")
    optimizer = SGD(0.5) if optimizer is None else optimizer
    model.compile(hvd.DistributedOptimizer(optimizer), "mse", run_eagerly=True)
    seen = Rates()
    history = model.fit(
        flat(mine(x)),
        flat(mine(y)),
        batch_size=BATCH,
        epochs=epochs,
        verbose=0,
        callbacks=[*callbacks, seen],
        **options,
    )
    return seen.seen, history.history


def test_a_constant_multiplies_within_its_epochs():
    seen, history = rates(Schedule(0.5, 0.1, 1, 3), epochs=4)
    np.testing.assert_allclose(seen, np.repeat([0.5, 0.05, 0.05, 0.05], STEPS), rtol=1e-6)
    np.testing.assert_allclose(history["lr"], [0.5, 0.05, 0.05, 0.05], rtol=1e-6)


def test_a_staircase_of_several_callbacks_as_in_horovods_imagenet_example():
    steps = [
        Schedule(initial_lr=0.4, multiplier=1.0, start_epoch=0, end_epoch=1),
        Schedule(initial_lr=0.4, multiplier=1e-1, start_epoch=1, end_epoch=2),
        Schedule(initial_lr=0.4, multiplier=1e-2, start_epoch=2),
    ]
    seen, _ = rates(*steps, epochs=4)
    np.testing.assert_allclose(seen, np.repeat([0.4, 0.04, 0.004, 0.004], STEPS), rtol=1e-6)


def test_a_staircase_asks_its_function_with_whole_epochs():
    asked = []
    seen, _ = rates(Schedule(0.2, lambda epoch: asked.append(epoch) or 1 / (1 + epoch)))
    assert asked == [0, 1, 2] and all(isinstance(epoch, int) for epoch in asked)
    np.testing.assert_allclose(seen, np.repeat([0.2, 0.1, 0.2 / 3], STEPS), rtol=1e-6)


def test_a_smooth_schedule_asks_before_each_batch():
    seen, _ = rates(Schedule(0.2, lambda epoch: 1 + epoch, staircase=False, start_epoch=1), epochs=2)
    expected = [0.5] * STEPS + [0.2 * (2 + batch / STEPS) for batch in range(STEPS)]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_warm_up_follows_its_formula_also_when_resumed_midway(start):
    size = hvd.size()
    seen, history = rates(Warmup(0.3, 2), epochs=3, initial_epoch=start, optimizer=SGD(0.3))
    epochs = np.arange(start * STEPS, 3 * STEPS) / STEPS
    np.testing.assert_allclose(seen, 0.3 / size * ((size - 1) / 2 * np.minimum(epochs, 2) + 1), rtol=1e-6)
    ends = np.minimum(np.arange(start + 1, 4), 2)
    np.testing.assert_allclose(history["lr"], 0.3 / size * ((size - 1) / 2 * ends + 1), rtol=1e-6)


def test_warm_up_starts_at_the_rate_of_one_process_and_ends_at_the_full_one():
    seen, history = rates(Warmup(initial_lr=0.8, warmup_epochs=1, steps_per_epoch=STEPS), epochs=1)
    np.testing.assert_allclose(seen[0], 0.8 / hvd.size(), rtol=1e-6)
    assert history["lr"] == [np.float32(0.8)]


def test_warm_up_of_part_of_an_epoch_never_exceeds_the_full_rate():
    seen, _ = rates(Warmup(0.8, 0.5), epochs=2)
    expected = 0.8 / hvd.size() * ((hvd.size() - 1) / 0.5 * np.arange(2 * STEPS) / STEPS + 1)
    np.testing.assert_allclose(seen, np.minimum(expected, 0.8), rtol=1e-6)


@pytest.mark.parametrize("verbose", [0, 1])
def test_the_end_of_the_warm_up_is_said_once_on_rank_0(verbose, capsys):
    rates(Warmup(0.8, 2, True, STEPS, verbose), epochs=3)
    said = capsys.readouterr().out.count("Epoch 2: finished gradual learning rate warmup to 0.8.")
    assert said == (verbose and hvd.rank() == 0)


def endless(steps=None):
    while True:
        yield np.zeros((BATCH, 6), "float32"), np.zeros((BATCH, 3), "float32")


def few():
    for _ in range(STEPS):
        yield next(endless())


def trained_from(generator, callback, **options):
    model = dense_model("float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", run_eagerly=True)
    return model.fit(generator, verbose=0, callbacks=[callback], **options)


def test_batches_that_nobody_counted():
    with pytest.raises(ValueError, match=r"LearningRateWarmupCallback\(\.\.\., steps_per_epoch=N\)"):
        trained_from(few(), Warmup(0.1))
    trained_from(few(), Warmup(0.1, steps_per_epoch=STEPS))
    trained_from(endless(), Warmup(0.1), steps_per_epoch=2)
    trained_from(few(), Schedule(0.1, 0.5))


@pytest.mark.parametrize("make", [Schedule, Warmup])
def test_a_rate_that_cannot_be_set(make):
    callback = make(0.1, 0.5)
    for rate in (keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9), lambda: 0.1):
        with pytest.raises(ValueError, match="cannot be set"):
            rates(callback, optimizer=SGD(rate))


def test_the_initial_rate_is_that_of_a_new_optimizer():
    optimizer = SGD(0.8)
    seen, _ = rates(Warmup(warmup_epochs=1), epochs=2, optimizer=optimizer)
    expected, _ = rates(Warmup(0.8, warmup_epochs=1), epochs=2)
    np.testing.assert_allclose(seen, expected)
    assert seen[-1] == pytest.approx(0.8)
    x, y = data(STEPS, "float32")
    model = dense_model("float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.5)), "mse")
    fit(model, mine(x), mine(y), BATCH)
    with pytest.raises(ValueError, match="initial_lr is missing, and the optimizer has done 4 steps"):
        model.fit(flat(mine(x)), flat(mine(y)), verbose=0, callbacks=[Warmup()])


def reference(x, y, weights, schedule, momentum, nesterov):
    """Momentum SGD whose velocity holds gradients only, so that a change of the rate needs no correction."""
    kernel, bias = weights
    velocity = [np.zeros_like(kernel), np.zeros_like(bias)]
    for inputs, targets, rate in zip(x, y, schedule, strict=True):
        error = 2 * (inputs @ kernel + bias - targets) / targets.size
        gradients = [inputs.T @ error, error.sum(axis=0)]
        velocity = [momentum * old + each for old, each in zip(velocity, gradients, strict=True)]
        ahead = [momentum * old + each for old, each in zip(velocity, gradients, strict=True)]
        steps = ahead if nesterov else velocity
        kernel, bias = kernel - rate * steps[0], bias - rate * steps[1]
    return kernel, bias


def linear_model(seed=3):
    init = keras.initializers.GlorotUniform(seed=seed)
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3, kernel_initializer=init, dtype="float64")]
    )


@pytest.mark.slow
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
def test_momentum_correction_in_a_compiled_step_is_that_of_the_paper(nesterov, corrected):
    """Rates and momentum are powers of two, which Keras, rounding them to float32, holds exactly."""
    x, y = data(3 * STEPS, "float32")
    model = linear_model()
    start = [each.numpy() for each in model.weights]
    optimizer = SGD(0.125, momentum=0.5, nesterov=nesterov)
    model.compile(hvd.DistributedOptimizer(optimizer), keras.losses.MeanSquaredError(dtype="float64"))
    factors = [1.0, 0.25, 2.0]
    callback = Schedule(0.125, lambda epoch: factors[epoch], momentum_correction=corrected)
    for epoch in range(3):
        part = slice(epoch * STEPS, (epoch + 1) * STEPS)
        model.fit(
            flat(mine(x)[part]),
            flat(mine(y)[part]),
            batch_size=BATCH,
            shuffle=False,
            initial_epoch=epoch,
            epochs=epoch + 1,
            verbose=0,
            callbacks=[callback],
        )
    expected = reference(x, y, start, 0.125 * np.repeat(factors, STEPS), 0.5, nesterov)
    differ = [
        np.abs(ours.numpy() - theirs).max() for ours, theirs in zip(model.weights, expected, strict=True)
    ]
    assert max(differ) < 1e-12 if corrected else min(differ) > 1e-3
    assert_identical(model)


def test_rmsprop_has_a_velocity_that_holds_the_rate_too():
    """Doubling the rate and the corrected velocity is doubling every later step of the first kind."""
    x, y = data(2)

    def displacement(rate, momentum_correction):
        model = linear_model()
        model.compile(
            hvd.DistributedOptimizer(keras.optimizers.RMSprop(0.125, momentum=0.9)), "mse", run_eagerly=True
        )
        fit(model, mine(x)[:1], mine(y)[:1], BATCH)
        before = model.layers[0].kernel.numpy()
        once = Schedule(rate, 1.0, momentum_correction=momentum_correction)
        fit(model, mine(x)[1:], mine(y)[1:], BATCH, callbacks=[once])
        return model.layers[0].kernel.numpy() - before

    np.testing.assert_allclose(displacement(0.25, True), 2 * displacement(0.125, True), rtol=1e-12)
    assert np.abs(displacement(0.25, False) - 2 * displacement(0.125, True)).max() > 1e-3


@pytest.mark.parametrize("optimizer", [keras.optimizers.Adam, keras.optimizers.Lion])
def test_velocities_that_do_not_hold_the_rate_are_left_alone(optimizer):
    x, y = data(1)
    model = linear_model()
    model.compile(hvd.DistributedOptimizer(optimizer(0.125)), "mse", run_eagerly=True)
    fit(model, mine(x), mine(y), BATCH)
    state = [each.numpy() for each in model.optimizer.variables[2:]]
    callback = Schedule(0.25, 1.0)
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    callback.on_batch_begin(0)
    assert float(model.optimizer.learning_rate) == 0.25
    for before, after in zip(state, model.optimizer.variables[2:], strict=True):
        np.testing.assert_array_equal(before, after.numpy())


def test_a_momentum_of_unknown_meaning_is_said(capfd):
    class Own(keras.optimizers.Adam):
        momentum = 0.9

    rates(Schedule(0.1, 1.0), epochs=1, optimizer=Own(0.1))
    said = capfd.readouterr().err
    assert ("Own uses its momentum" in said) == (hvd.rank() == 0)
    rates(Schedule(0.1, 1.0, momentum_correction=False), epochs=1, optimizer=Own(0.1))
    assert "momentum" not in capfd.readouterr().err


def test_a_rate_of_zero_and_back():
    seen, _ = rates(Schedule(0.5, lambda epoch: float(epoch != 1)), optimizer=SGD(0.5, momentum=0.9))
    assert seen == [0.5] * STEPS + [0.0] * STEPS + [0.5] * STEPS


def test_inside_a_loss_scale_optimizer():
    loss_scaled = keras.optimizers.LossScaleOptimizer(SGD(0.5, momentum=0.9))
    seen, history = rates(Schedule(0.5, 0.5, start_epoch=1), epochs=2, optimizer=loss_scaled)
    assert seen == [0.5] * STEPS + [0.25] * STEPS
    assert history["lr"] == [0.5, 0.25]


def test_all_ranks_keep_the_same_rate_beside_the_broadcast():
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()]
    _, history = rates(*callbacks, Warmup(0.5, 2), epochs=3, optimizer=SGD(0.5, momentum=0.9))
    assert len({tuple(each) for each in hvd.allgather_object(history["lr"])}) == 1
