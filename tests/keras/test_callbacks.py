"""The callbacks: equal starts, and metrics over all samples instead of means of means."""

import keras
import numpy as np
import pytest
from twins import BATCH, assert_identical, data, dense_model, fit, flat, mine

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


def test_dropout_goes_on_differing_between_ranks():
    model = normed_model(seed=hvd.rank() + 1)
    x, y = data(1, "float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse")
    model.fit(flat(x), flat(y), verbose=0, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    masks = hvd.allgather_object(model.layers[2](np.ones((8, 3), "float32"), training=True).numpy().tobytes())
    assert len(set(masks)) == hvd.size()


def test_a_root_that_is_no_rank():
    model = dense_model("float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse")
    x, y = data(1, "float32")
    with pytest.raises(ValueError, match="root_rank=99"):
        fit(model, mine(x), mine(y), BATCH, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(99)])


def test_an_optimizer_that_is_not_distributed_is_reported(capfd):
    x, y = data(1, "float32")
    model = dense_model("float32")
    model.compile(SGD(0.1), "mse")
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
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", metrics=["mae"] if hvd.rank() == 1 else [])
    with pytest.raises(hvd.MismatchError, match="mae"):
        fit(model, mine(x), mine(y), BATCH, callbacks=[hvd.callbacks.MetricAverageCallback()])


def test_early_stopping_behind_the_average_stops_all_ranks_together():
    x, y = data(2, "float32")
    model = dense_model("float32")
    model.compile(hvd.DistributedOptimizer(SGD(0.0)), "mse")
    stop = keras.callbacks.EarlyStopping("loss", patience=1)
    fit(model, mine(x), mine(y), BATCH, epochs=9, callbacks=[hvd.callbacks.MetricAverageCallback(), stop])
    assert set(hvd.allgather_object(stop.stopped_epoch)) == {1}
    assert_identical(model)
