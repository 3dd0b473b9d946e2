"""The callbacks: equal starts, and metrics over all samples instead of means of means."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import BATCH, assert_identical, data, dense_model, fit, flat, gradients, mine

import hvdtrain.keras as hvd

pytestmark = pytest.mark.ranks

SGD = keras.optimizers.SGD


def normed_model(seed):
    """With state that no gradient reaches: BatchNorm's statistics and a random generator's."""
    model = dense_model("float32", seed=seed)
    return keras.Sequential([model, keras.layers.BatchNormalization(), keras.layers.Dropout(0.5, seed=seed)])


class StateAtFirstStep(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.seen = [weight.numpy() for weight in self.model.weights]


def test_all_ranks_start_from_the_roots_weights_and_state():
    root = hvd.size() - 1
    x, y = data(2, "float32")
    model = normed_model(seed=hvd.rank())
    model.layers[1].moving_mean.assign([hvd.rank()] * 3)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.1 * (1 + hvd.rank()))), "mse")
    state = StateAtFirstStep()
    fit(
        model,
        mine(x),
        mine(y),
        BATCH,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(root), state],
    )
    expected = dense_model("float32", seed=root).layers[0].kernel.numpy()
    np.testing.assert_array_equal(state.seen[0], expected)
    np.testing.assert_array_equal(model.optimizer.learning_rate.numpy(), np.float32(0.1 * (1 + root)))
    means = next(
        seen for seen, weight in zip(state.seen, model.weights, strict=True) if "moving_mean" in weight.path
    )
    np.testing.assert_array_equal(means, [root] * 3)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)

    def call(self, x):
        return self.head(self.hidden(x))


@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.Sequential(
            [keras.layers.Dense(5), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
        ),
        Subclassed,
    ],
    ids=["Sequential", "subclassed"],
)
def test_a_model_that_its_first_batch_builds_starts_equal_too(make, eager):
    x, y = data(3, "float32")
    keras.utils.set_random_seed(hvd.rank())
    model = make()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.1)), "mse", run_eagerly=eager)
    fit(model, mine(x), mine(y), BATCH, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    assert int(model.optimizer.iterations.numpy()) == 3
    trained = [weight.numpy().tobytes() for weight in model.trainable_weights]
    assert len({tuple(each) for each in hvd.allgather_object(trained)}) == 1


def test_a_model_that_cannot_be_built_from_a_batch_is_refused_in_a_sentence():
    class Refuses(Subclassed):
        def call(self, x):
            raise KeyError("no such input")

        def train_step(self, batch):
            return {"loss": 0.0}

    if hvd.size() == 1:
        pytest.skip("nothing is broadcast in a world of one")
    model = Refuses()
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse")
    x, y = data(1, "float32")
    with pytest.raises(ValueError, match=r"keras\.Input"):
        fit(model, mine(x), mine(y), BATCH, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])


class Adversaries(keras.Model):
    """As in Keras' GAN example: two networks, two optimizers of its own, a compiled one that nobody uses."""

    def __init__(self):
        super().__init__()
        self.one, self.other = (
            dense_model("float32", seed=hvd.rank()),
            dense_model("float32", seed=hvd.rank() + 9),
        )

    def compile(self):
        super().compile()
        self.optimizers = None
        self.one_optimizer = hvd.DistributedOptimizer(SGD(0.1, momentum=0.9))
        self.other_optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01))

    def train_step(self, batch):
        for model, optimizer in ((self.one, self.one_optimizer), (self.other, self.other_optimizer)):
            optimizer.apply_gradients(zip(gradients(model, *batch), model.trainable_variables, strict=True))
        return {"done": 1.0}


def test_a_model_with_optimizers_of_its_own(capfd):
    x, y = data(3, "float32")
    model = Adversaries()
    model.compile()
    fit(model, mine(x), mine(y), BATCH, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    assert "not distributed" not in capfd.readouterr().err
    for each in (model.one, model.other):
        digests = hvd.allgather_object([weight.numpy().tobytes() for weight in each.weights])
        assert all(digest == digests[0] for digest in digests)


def test_layers_numbered_otherwise_on_one_rank_are_broadcast_all_the_same():
    if hvd.rank() == 0:
        dense_model()
    x, y = data(1, "float32")
    model = dense_model("float32", seed=hvd.rank())
    model.compile(hvd.DistributedOptimizer(SGD(0.1, momentum=0.9)), "mse", run_eagerly=True)
    fit(model, mine(x), mine(y), BATCH, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    assert_identical(model)


def test_a_learning_rate_that_parts_is_named_at_the_next_epoch():
    class Lower(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.optimizer.learning_rate = 0.1 / (1 + hvd.rank())

    if hvd.size() == 1:
        pytest.skip("a world of one agrees with itself")
    x, y = data(1, "float32")
    model = dense_model("float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", run_eagerly=True)
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), Lower()]
    with pytest.raises(hvd.MismatchError, match=r"learning rate 0\.05"):
        fit(model, mine(x), mine(y), BATCH, epochs=3, callbacks=callbacks)


def test_a_rank_with_fewer_batches_is_named_instead_of_waited_for():
    if hvd.size() == 1:
        pytest.skip("a world of one agrees with itself")
    x, y = data(3, "float32")
    model = dense_model("float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse")
    steps = 2 if hvd.rank() == 1 else 3
    differ = r"(?s)number of steps an epoch differs.*rank 0: 3.*rank 1: 2"
    with pytest.raises((hvd.MismatchError, tf.errors.OpError), match=differ):
        fit(
            model,
            mine(x)[:steps],
            mine(y)[:steps],
            BATCH,
            callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)],
        )


def test_dropout_goes_on_differing_between_ranks():
    model = normed_model(seed=hvd.rank() + 1)
    x, y = data(1, "float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse")
    model.fit(flat(x), flat(y), verbose=0, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    masks = hvd.allgather_object(model.layers[2](np.ones((8, 3), "float32"), training=True).numpy().tobytes())
    assert len(set(masks)) == hvd.size()


def test_a_root_that_is_no_rank():
    model = dense_model("float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", run_eagerly=True)
    x, y = data(1, "float32")
    with pytest.raises(ValueError, match="root_rank=99"):
        fit(model, mine(x), mine(y), BATCH, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(99)])


def test_an_optimizer_that_is_not_distributed_is_reported(capfd):
    x, y = data(1, "float32")
    model = dense_model("float32")
    model.compile(SGD(0.1), "mse", run_eagerly=True)
    fit(model, mine(x), mine(y), BATCH, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    said = "not distributed" in capfd.readouterr().err
    assert said == (hvd.rank() == 0 and hvd.size() > 1)


def test_other_variables_on_one_rank_are_named():
    if hvd.size() == 1:
        pytest.skip("a world of one agrees with itself")
    model = dense_model("float32" if hvd.rank() != 1 else "float64")
    with pytest.raises(hvd.MismatchError, match="rank 1"):
        hvd.broadcast_variables(model.weights)


@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
def test_metrics_weigh_samples_not_ranks(eager):
    """Rank r trains on r+1 batches' worth of samples, in one step, and validates on another number."""
    random = np.random.default_rng(7)
    model = dense_model("float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.0)), "mse", metrics=["mae"], run_eagerly=eager)
    sizes = [(4 * (rank + 1), 3 * (hvd.size() - rank)) for rank in range(hvd.size())]
    sets = [
        [(random.standard_normal((n, 6)), random.standard_normal((n, 3))) for n in pair] for pair in sizes
    ]
    (x, y), validation = sets[hvd.rank()]
    history = model.fit(
        x,
        y,
        batch_size=1000,
        epochs=2,
        verbose=0,
        validation_data=validation,
        validation_batch_size=2,
        callbacks=[hvd.callbacks.MetricAverageCallback()],
    ).history
    for index, prefix in ((0, ""), (1, "val_")):
        inputs = np.concatenate([each[index][0] for each in sets])
        errors = model(inputs.astype("float32")).numpy() - np.concatenate([each[index][1] for each in sets])
        np.testing.assert_allclose(history[f"{prefix}loss"], np.mean(errors**2), rtol=1e-5)
        np.testing.assert_allclose(history[f"{prefix}mae"], np.mean(np.abs(errors)), rtol=1e-5)


def test_a_metric_that_one_rank_lacks_is_named():
    if hvd.size() == 1:
        pytest.skip("a world of one agrees with itself")
    x, y = data(1, "float32")
    model = dense_model("float32")
    model.compile(
        hvd.DistributedOptimizer(SGD(0.1)),
        "mse",
        metrics=["mae"] if hvd.rank() == 1 else [],
        run_eagerly=True,
    )
    with pytest.raises(hvd.MismatchError, match="MeanAbsoluteError"):
        fit(model, mine(x), mine(y), BATCH, callbacks=[hvd.callbacks.MetricAverageCallback()])


def test_early_stopping_behind_the_average_stops_all_ranks_together():
    x, y = data(2, "float32")
    model = dense_model("float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.0)), "mse", run_eagerly=True)
    stop = keras.callbacks.EarlyStopping("loss", patience=1)
    fit(model, mine(x), mine(y), BATCH, epochs=9, callbacks=[hvd.callbacks.MetricAverageCallback(), stop])
    assert set(hvd.allgather_object(stop.stopped_epoch)) == {1}
    assert_identical(model)


def wait_for(model, callback):
    callback.set_model(model)
    callback.on_train_begin()


@pytest.mark.parametrize("given", ["one", "several", "registered", "keras"])
def test_local_variables_stay_each_ranks_own(given):
    model = dense_model("float32", seed=hvd.rank())
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse")
    kernel, bias = model.layers[0].kernel, model.layers[0].bias
    bias.assign(bias + hvd.rank())
    choices = {
        "one": kernel.value,
        "several": [kernel.value, bias.value],
        "keras": [kernel],
        "registered": None,
    }
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0, "", choices[given])
    if given == "registered":
        callback.register_local_var(kernel.value)
    before = [each.numpy() for each in (kernel, bias)]
    wait_for(model, callback)
    np.testing.assert_array_equal(kernel.numpy(), before[0])
    expected = before[1] if given == "several" else np.zeros(8)
    np.testing.assert_array_equal(bias.numpy(), expected)
    shared = dense_model("float32", seed=0).layers[1].kernel.numpy()
    np.testing.assert_array_equal(model.layers[1].kernel.numpy(), shared)


@pytest.mark.parametrize("wrong", [[1.0], ["kernel"], [np.zeros(3)]])
def test_local_variables_are_variables(wrong):
    with pytest.raises(ValueError, match="All local variables must be of type"):
        hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=wrong)


@pytest.fixture
def halves():
    """The even ranks and the odd ones, as two process sets; this rank's own first."""
    if hvd.size() == 1:
        pytest.skip("a world of one has no halves")
    sets = [hvd.add_process_set(range(first, hvd.size(), 2)) for first in (0, 1)]
    yield sets if sets[0].included() else sets[::-1]
    for each in sets:
        hvd.remove_process_set(each)


def test_two_models_train_at_once_on_two_halves_of_the_world(halves):
    """Different models, different numbers of epochs: the halves never meet before the end."""
    ours, _ = halves
    odd = hvd.rank() % 2
    x, y = data(4, "float32", seed=odd)
    model = dense_model("float32" if odd else "float64", seed=hvd.rank())
    model.compile(hvd.DistributedOptimizer(SGD(0.1, momentum=0.5), process_set=ours), "mse", run_eagerly=True)
    place = ours.rank() * BATCH
    part = [each[:, place : place + BATCH] for each in (x, y)]
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(ours.ranks[-1]),
        hvd.callbacks.MetricAverageCallback(process_set=ours),
        hvd.callbacks.LearningRateWarmupCallback(0.1, 1),
    ]
    logs = Logs()
    fit(model, *part, BATCH, epochs=2 + odd, callbacks=[*callbacks, logs])

    twin = dense_model("float32" if odd else "float64", seed=ours.ranks[-1])
    twin.compile(SGD(0.1, momentum=0.5), "mse", run_eagerly=True)
    size = len(ours.ranks)
    warm = hvd.callbacks.LearningRateScheduleCallback(
        0.1, lambda epoch: min(1, ((size - 1) * epoch + 1) / size), staircase=False
    )
    whole = [each[:, : size * BATCH] for each in (x, y)]
    expected = Logs()
    fit(twin, *whole, BATCH * size, epochs=2 + odd, callbacks=[warm, expected])
    for one, other in zip(model.weights, twin.weights, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(logs.losses, expected.losses, rtol=1e-5)


class Logs(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.losses = []

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(logs["loss"])


def test_a_model_of_one_half_leaves_the_other_half_alone(halves):
    """All ranks run the same script; those outside the set train by themselves, and wait for nobody."""
    evens = next(each for each in halves if 0 in each.ranks)
    x, y = data(2, "float32")
    model = dense_model("float32", seed=hvd.rank())
    model.compile(hvd.DistributedOptimizer(SGD(0.1), process_set=evens), "mse", run_eagerly=True)
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()]
    fit(model, mine(x), mine(y), BATCH, callbacks=callbacks)
    weights = hvd.allgather_object(model.layers[0].kernel.numpy().tobytes())
    assert len({weights[rank] for rank in evens.ranks}) == 1
    assert len(set(weights)) == 1 + hvd.size() - len(evens.ranks)


def test_a_root_outside_the_set_is_refused(halves):
    ours, others = halves
    model = dense_model("float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.1), process_set=ours), "mse")
    with pytest.raises(ValueError, match=f"root_rank={others.ranks[0]}"):
        wait_for(model, hvd.callbacks.BroadcastGlobalVariablesCallback(others.ranks[0]))
