"""Training on sharded data is the training of one process on the same batches, filler or not."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.keras as hvd
from hvdtrain.data import shard
from hvdtrain.data.sample_plan import permutation
from hvdtrain.keras.patches import usage_warnings

pytestmark = pytest.mark.ranks

LENGTH, BATCH, EPOCHS = 27, 8, 2
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((LENGTH, 5))
Y = RANDOM.integers(0, 3, LENGTH)
WEIGHT = RANDOM.uniform(0.1, 3, LENGTH)


@pytest.fixture(autouse=True)
def float64():
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


class Batches(keras.utils.PyDataset):
    """The global batches, as one process trains on them: the reference, written without hvdtrain's plan."""

    def __init__(self, *arrays, shuffle=True, drop=False):
        super().__init__()
        self.arrays, self.shuffle, self.drop, self.epoch, self.begun = arrays, shuffle, drop, 0, False

    def __len__(self):
        return LENGTH // BATCH if self.drop else -(-LENGTH // BATCH)

    def __getitem__(self, index):
        order = permutation(LENGTH, 0, self.epoch) if self.shuffle else np.arange(LENGTH)
        rows = order[index * BATCH : (index + 1) * BATCH]
        return tuple(each[rows] for each in self.arrays)

    def on_epoch_begin(self):
        self.begun = True

    def on_epoch_end(self):
        self.epoch += self.begun
        self.begun = False


class States(keras.callbacks.Callback):
    """Keeps total and count of every mean at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_end(self, epoch, logs=None):
        means = [(each.name, float(each.total), float(each.count)) for each in self.metrics()]
        self.epochs.append({name: np.array([total, count]) for name, total, count in means})

    def metrics(self):
        found = []
        for each in self.model.metrics:
            found += getattr(each, "metrics", [each])
        return [each for each in found if hasattr(each, "total")]

    def over_all_ranks(self):
        everyone = hvd.allgather_object(self.epochs)
        return [
            {name: sum(ranks[epoch][name] for ranks in everyone) for name in everyone[0][epoch]}
            for epoch in range(len(self.epochs))
        ]


def model(**options):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(7, "tanh", kernel_regularizer=keras.regularizers.L2(0.01)),
            keras.layers.Dense(3, "softmax"),
        ],
        **options,
    )


def trained(network, optimizer, data, loss="sparse_categorical_crossentropy", **options):
    network.compile(
        optimizer,
        loss,
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(name="weighted")],
        run_eagerly=options.pop("run_eagerly", True),  # quicker than compiling a few steps
        steps_per_execution=options.pop("steps_per_execution", 1),
    )
    states = States()
    network.fit(data, epochs=EPOCHS, verbose=0, callbacks=[states], **options)
    return network, states


def compiled(network):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    network.compile(optimizer, "sparse_categorical_crossentropy", run_eagerly=True)


def assert_twins(sharded, reference, steps=None, **options):
    """The same weights to 1e-10, and the same loss and metrics once the ranks' counts are added up."""
    ours, ours_states = trained(
        model(),
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, 0.9)),
        sharded,
        steps_per_epoch=steps,
        **options,
    )
    theirs, theirs_states = trained(model(), keras.optimizers.SGD(0.1, 0.9), reference, shuffle=False)
    for mine, alone in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, alone, rtol=1e-10, atol=1e-12)
    for mine, alone in zip(ours_states.over_all_ranks(), theirs_states.epochs, strict=True):
        assert mine.keys() == alone.keys()
        for name in mine:
            np.testing.assert_allclose(mine[name], alone[name], rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("remainder", ["keep", "drop"])
def test_arrays_train_as_on_one_process(shuffle, remainder):
    data = shard((X, Y), BATCH, shuffle, remainder=remainder)
    assert_twins(data, Batches(X, Y, shuffle=shuffle, drop=remainder == "drop"))


def test_so_do_sample_weights():
    assert_twins(shard((X, Y, WEIGHT), BATCH), Batches(X, Y, WEIGHT))


def test_and_class_weights_in_shard_or_in_fit():
    by_class = {0: 0.3, 2: 2.5}
    weights = np.array([by_class.get(int(each), 1.0) for each in Y])
    assert_twins(shard((X, Y), BATCH, class_weight=by_class), Batches(X, Y, weights))
    ours, _ = trained(
        model(),
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, 0.9)),
        shard((X, Y), BATCH),
        class_weight=by_class,
    )
    theirs, _ = trained(model(), keras.optimizers.SGD(0.1, 0.9), Batches(X, Y, weights), shuffle=False)
    for mine, alone in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, alone, rtol=1e-10, atol=1e-12)


class Users(keras.utils.PyDataset):
    """A data set in a user's manner, whose batches are the global ones."""

    def __len__(self):
        return -(-LENGTH // BATCH)

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return X[rows], Y[rows], WEIGHT[rows]


def slices():
    return tf.data.Dataset.from_tensor_slices((X, Y, WEIGHT))


@pytest.mark.parametrize(
    "make",
    [
        lambda: shard(slices(), BATCH),
        lambda: shard(slices().batch(BATCH).prefetch(2)),
        lambda: shard(slices().batch(5), BATCH),
        lambda: shard(Users(), shuffle=False),
    ],
    ids=["samples", "batches", "other batches", "PyDataset"],
)
def test_every_kind_of_data_trains_as_on_one_process(make):
    assert_twins(make(), Batches(X, Y, WEIGHT, shuffle=False))


def test_a_generator_does_too():
    def batches():
        for _ in range(EPOCHS):
            yield from (Users()[index] for index in range(len(Users())))

    with (
        pytest.warns(UserWarning, match="neither length nor order")
        if hvd.rank() == 0
        else contextlib.nullcontext()
    ):
        data = shard(batches(), BATCH)
    assert_twins(data, Batches(X, Y, WEIGHT, shuffle=False), steps=len(Users()))


def test_fewer_samples_than_ranks():
    few = shard((X[:1], Y[:1]), BATCH)
    ours, states = trained(model(), hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), few)
    theirs, alone = trained(model(), keras.optimizers.SGD(0.1), tf.data.Dataset.from_tensors((X[:1], Y[:1])))
    for mine, single in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, single, rtol=1e-10, atol=1e-12)
    for mine, single in zip(states.over_all_ranks(), alone.epochs, strict=True):
        for name in single:
            np.testing.assert_allclose(mine[name], single[name], rtol=1e-10, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: shard((X, Y, WEIGHT), BATCH, False), lambda: shard(slices(), BATCH)]
)
@pytest.mark.parametrize("steps", [1, 2])
def test_compiled_steps_one_or_several_at_once(make, steps):
    reference = Batches(X, Y, WEIGHT, shuffle=False)
    assert_twins(make(), reference, run_eagerly=False, steps_per_execution=steps)


def test_with_gradient_accumulation():
    make = lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)  # noqa: E731
    ours, _ = trained(model(), hvd.DistributedOptimizer(make()), shard((X, Y), BATCH))
    theirs, _ = trained(model(), make(), Batches(X, Y), shuffle=False)
    for mine, alone in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False])
def test_several_inputs_and_outputs(eager):
    def make():
        keras.utils.set_random_seed(3)
        left, right = keras.Input((2,), name="left"), keras.Input((3,), name="right")
        both = keras.layers.Concatenate()([left, right])
        outputs = {
            "a": keras.layers.Dense(3, "softmax", name="a")(both),
            "b": keras.layers.Dense(1, name="b")(both),
        }
        return keras.Model({"left": left, "right": right}, outputs)

    def run(optimizer, data, **options):
        network = make()
        network.compile(
            optimizer,
            {"a": "sparse_categorical_crossentropy", "b": "mse"},
            loss_weights={"a": 1.0, "b": 0.5},
            metrics={"a": ["accuracy"], "b": ["mae"]},
            run_eagerly=eager,
        )
        states = States()
        network.fit(data, epochs=2, verbose=0, callbacks=[states], **options)
        return network, states

    x, y = {"left": X[:, :2], "right": X[:, 2:]}, {"a": Y, "b": WEIGHT[:, None]}
    ours, states = run(
        hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), shard((x, y), BATCH, shuffle=False)
    )
    whole = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    theirs, alone = run(keras.optimizers.Adam(0.01), whole)
    for mine, single in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, single, rtol=1e-10, atol=1e-12)
    for mine, single in zip(states.over_all_ranks(), alone.epochs, strict=True):
        for name, (total, count) in single.items():
            # Keras averages the outputs' losses over batches, of which several ranks count as many each.
            np.testing.assert_allclose(mine[name][0] / mine[name][1], total / count, rtol=1e-10, err_msg=name)


def test_evaluation_counts_every_sample_once():
    network = model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD())
    network.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], run_eagerly=True)
    network.fit(shard((X, Y), BATCH), validation_data=shard((X, Y), BATCH, shuffle=False), verbose=0)
    network.evaluate(shard((X, Y), BATCH, shuffle=False), verbose=0)
    states = States()
    states.set_model(network)
    states.on_epoch_end(0)
    (total,) = states.over_all_ranks()
    network.evaluate(X, Y, batch_size=BATCH, verbose=0)
    states.on_epoch_end(1)
    for name, (sum_, count) in states.epochs[1].items():
        np.testing.assert_allclose(total[name], [sum_, count], rtol=1e-10, err_msg=name)
    assert states.epochs[1]["loss"][1] == LENGTH


def test_a_train_step_of_ones_own():
    class Own(keras.Sequential):
        def train_step(self, data):
            x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=y, y_pred=self(x, training=True), sample_weight=weight)
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"loss": loss}

    trained_weights = []
    for optimizer, data in (
        (hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), shard((X, Y), BATCH)),
        (keras.optimizers.SGD(0.1), Batches(X, Y)),
    ):
        network = Own([keras.Input((5,)), keras.layers.Dense(3, "softmax", kernel_initializer="ones")])
        network.compile(optimizer, "sparse_categorical_crossentropy", run_eagerly=True)
        network.fit(data, epochs=2, verbose=0, shuffle=False)
        trained_weights.append(network.get_weights())
    np.testing.assert_allclose(trained_weights[0][0], trained_weights[1][0], rtol=1e-10)


def test_fits_own_shuffling_and_weights_cannot_spoil_the_order():
    first, _ = trained(
        model(), hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), shard((X, Y), BATCH), shuffle=True
    )
    second, _ = trained(
        model(), hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), shard((X, Y), BATCH), shuffle=False
    )
    for mine, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)
    with pytest.raises(ValueError, match="already contains y"):
        first.fit(shard((X, Y), BATCH), Y, verbose=0)


def test_a_run_resumed_inside_an_epoch_ends_the_same():
    whole = model()
    compiled(whole)
    whole.fit(shard((X, Y), BATCH), epochs=3, verbose=0)

    class StopAt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if data.state() == {"epoch": 1, "step": 2}:
                self.model.stop_training = True
                self.state = data.state()

    parts, data, stop = model(), shard((X, Y), BATCH), StopAt()
    compiled(parts)
    parts.fit(data, epochs=3, verbose=0, callbacks=[stop])
    resumed = shard((X, Y), BATCH, **stop.state)
    assert len(resumed) == 2
    parts.fit(resumed, initial_epoch=1, epochs=2, verbose=0)
    parts.fit(resumed, initial_epoch=2, epochs=3, verbose=0)
    for mine, other in zip(whole.get_weights(), parts.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: shard((X, Y), BATCH), lambda: shard(slices(), BATCH, True)], ids=["arrays", "dataset"]
)
def test_epochs_of_other_lengths_go_on_through_the_data(make):
    """Twelve steps are three epochs of the data, however `fit` cuts them."""
    weights = []
    for epochs, steps in ((3, None), (2, 6)):
        network, data = model(), make()
        network.compile(
            hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "sparse_categorical_crossentropy"
        )
        network.fit(data, epochs=epochs, steps_per_epoch=steps, verbose=0)
        assert data.state() == {"epoch": 3, "step": 0}
        weights.append(network.get_weights())
    for other in weights[1:]:
        for mine, first in zip(other, weights[0], strict=True):
            np.testing.assert_array_equal(mine, first)


def test_evaluate_and_predict_say_once_that_they_see_a_part(capfd, monkeypatch):
    monkeypatch.setattr(usage_warnings, "_printed", set())
    network, data = model(), shard((X, Y), BATCH, shuffle=False)
    compiled(network)
    network.fit(data, verbose=0, validation_data=data)
    network.evaluate(data, verbose=0, callbacks=[hvd.callbacks.MetricAverageCallback()])
    assert "hvd.evaluate" not in capfd.readouterr().err
    for _ in range(2):
        network.evaluate(data, verbose=0)
        network.predict(data, verbose=0)
    said = capfd.readouterr().err
    speaks = hvd.size() > 1 and hvd.rank() == 0
    assert said.count("hvd.evaluate(model, data)") == said.count("hvd.predict(model, data)") == speaks


@pytest.mark.parametrize(
    "make", [lambda: shard((X, Y), BATCH), lambda: shard(slices(), BATCH, True)], ids=["arrays", "dataset"]
)
def test_evaluating_on_one_rank_does_not_change_what_comes_next(make):
    network, data = model(), make()
    compiled(network)
    network.fit(data, verbose=0, validation_data=data)
    if hvd.rank() == hvd.size() - 1:
        network.evaluate(data, verbose=0)
    assert data.state() == {"epoch": 1, "step": 0}


def test_fit_says_once_that_an_optimizer_is_not_distributed(capfd, monkeypatch):
    monkeypatch.setattr(usage_warnings, "_printed", set())
    network = model()
    network.compile("sgd", "sparse_categorical_crossentropy")
    for _ in range(2):
        network.fit(shard((X, Y), BATCH), verbose=0)
    said = capfd.readouterr().err
    assert said.count("SGD, is not distributed") == (hvd.size() > 1 and hvd.rank() == 0)


@pytest.mark.parametrize("remainder", ["keep", "drop"])
def test_fit_says_once_that_metrics_of_what_was_made_of_sharded_data_count_filler(
    capfd, monkeypatch, remainder
):
    monkeypatch.setattr(usage_warnings, "_printed", set())
    network = model()
    compiled(network)
    for _ in range(2):
        network.fit(shard(slices(), BATCH, remainder=remainder).prefetch(1), verbose=0)
    speaks = hvd.size() > 1 and hvd.rank() == 0 and remainder == "keep"
    assert capfd.readouterr().err.count("Call hvd.shard last") == speaks
