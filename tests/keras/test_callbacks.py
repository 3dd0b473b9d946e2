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
    with pytest.raises((hvd.MismatchError, tf.errors.OpError), match="end of training"):
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
    with pytest.raises(hvd.MismatchError, match="mae"):
        fit(model, mine(x), mine(y), BATCH, callbacks=[hvd.callbacks.MetricAverageCallback()])


def test_early_stopping_behind_the_average_stops_all_ranks_together():
    x, y = data(2, "float32")
    model = dense_model("float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.0)), "mse", run_eagerly=True)
    stop = keras.callbacks.EarlyStopping("loss", patience=1)
    fit(model, mine(x), mine(y), BATCH, epochs=9, callbacks=[hvd.callbacks.MetricAverageCallback(), stop])
    assert set(hvd.allgather_object(stop.stopped_epoch)) == {1}
    assert_identical(model)
