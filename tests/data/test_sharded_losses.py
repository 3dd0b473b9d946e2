"""Whatever a loss looks like, training on sharded data is the training of one process on the same batches.

A table of trainings: tasks (what the loss is and how many axes it has) by sample weights, kinds of data, numbers
of samples that do and do not fill the last batch, and ways of running a step. Each is trained on all ranks and, on
each rank by itself, by plain Keras, in float64. HVDTRAIN_TESTS=full runs all combinations.
"""

import itertools
import os
import random
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.keras as hvd

pytestmark = pytest.mark.ranks

BATCH, EPOCHS = 8, 2
# Full batches; a last batch of 5, which no number of ranks divides; one of a single sample, which most ranks miss.
LENGTHS = (24, 21, 17)
STEPS = (
    4  # of a sequence: as many as samples of a batch on each of two ranks, where wrong axes pass unnoticed
)


@pytest.fixture(autouse=True, scope="module")
def float64():
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


def dense(units, activation=None, **options):
    return keras.layers.Dense(units, activation, **options)


def numbers(*shape, seed=0):
    return lambda length: np.random.default_rng(seed).standard_normal((length, *shape))


def classes(*shape, count=3, seed=1):
    return lambda length: np.random.default_rng(seed).integers(0, count, (length, *shape))


def one_hot(*shape, count=3):
    return lambda length: np.eye(count)[classes(*shape, count=count)(length)]


def vector_model(**options):
    return lambda: keras.Sequential([keras.Input((5,)), dense(4, "tanh"), dense(2, **options)])


def classifier():
    return keras.Sequential([keras.Input((5,)), dense(4, "tanh"), dense(3, "softmax")])


def sequence_model(units=1, activation=None):
    return lambda: keras.Sequential([keras.Input((STEPS, 5)), dense(units, activation)])


def image_model(channels, activation=None):
    return lambda: keras.Sequential(
        [keras.Input((4, 4, 2)), keras.layers.Conv2D(channels, 3, padding="same", activation=activation)]
    )


def masked_model():
    return keras.Sequential(
        [keras.Input((STEPS,)), keras.layers.Embedding(3, 4, mask_zero=True), dense(3, "softmax")]
    )


def several_outputs():
    x = keras.Input((STEPS, 5))
    flat = keras.layers.Flatten()(x)
    outputs = {"map": dense(2, name="map")(x), "label": dense(3, "softmax", name="label")(flat)}
    return keras.Model(x, outputs)


class Adds(keras.layers.Layer):
    """Adds a loss of its input's rows."""

    def __init__(self, loss_of):
        super().__init__()
        self.loss_of = loss_of

    def call(self, x):
        self.add_loss(self.loss_of(x))
        return x


def adding(loss_of):
    return lambda: keras.Sequential([keras.Input((5,)), dense(4, "tanh"), Adds(loss_of), dense(2)])


class OwnStep(keras.Sequential):
    """Computes its loss by Keras' own means."""

    def train_step(self, data):
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True), weight)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        self._loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return {"loss": self._loss_tracker.result()}


class OwnLoss(keras.Sequential):
    """Computes its loss by itself."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        self._loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return {"loss": self._loss_tracker.result()}


def mean_of_batch(y_true, y_pred):
    return tf.reduce_mean(tf.abs(y_true - y_pred))


def sum_of_batch(y_true, y_pred):
    return tf.reduce_sum(tf.abs(y_true - y_pred)) / 40.0


class TwoLosses(keras.losses.Loss):
    """A loss made of others, one of them a sum."""

    def __init__(self):
        super().__init__(name="two")
        self.parts = [keras.losses.MeanSquaredError(), keras.losses.MeanAbsoluteError()]

    def call(self, y_true, y_pred):
        return self.parts[0](y_true, y_pred) + 0.3 * self.parts[1](y_true, y_pred)


VECTOR = (numbers(5), numbers(2, seed=2))
# name: (inputs, targets, model, loss, axes of the loss)
TASKS = {
    "vector": (*VECTOR, vector_model(), "mse", 1),
    "classes": (numbers(5), classes(), classifier, "sparse_categorical_crossentropy", 1),
    "sequence": (numbers(STEPS, 5), numbers(STEPS, 1, seed=2), sequence_model(), "mse", 2),
    "tokens": (
        *(numbers(STEPS, 5), classes(STEPS), sequence_model(3, "softmax")),
        *("sparse_categorical_crossentropy", 2),
    ),
    "masked": (classes(STEPS), classes(STEPS, seed=3), masked_model, "sparse_categorical_crossentropy", 2),
    "ignored class": (
        *(numbers(STEPS, 5), classes(STEPS), sequence_model(3, "softmax")),
        *(lambda: keras.losses.SparseCategoricalCrossentropy(ignore_class=0), 2),
    ),
    "image": (numbers(4, 4, 2), numbers(4, 4, 1, seed=2), image_model(1), "mae", 3),
    "segments": (
        *(numbers(4, 4, 2), one_hot(4, 4), image_model(3, "softmax")),
        *("categorical_crossentropy", 3),
    ),
    "binary map": (
        *(numbers(4, 4, 2), classes(4, 4, 1, count=2), image_model(1, "sigmoid")),
        *(lambda: keras.losses.BinaryFocalCrossentropy(), 3),
    ),
    "mean of the batch": (*VECTOR, vector_model(), lambda: mean_of_batch, 0),
    "sum of the batch": (*VECTOR, vector_model(), lambda: sum_of_batch, 0),
    "reduction sum": (*VECTOR, vector_model(), lambda: keras.losses.Huber(reduction="sum"), 1),
    "reduction by weights": (
        *(numbers(STEPS, 5), numbers(STEPS, 1, seed=2), sequence_model()),
        *(lambda: keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"), 2),
    ),
    "loss of losses": (*VECTOR, vector_model(), TwoLosses, 0),
    "regularized": (*VECTOR, vector_model(kernel_regularizer="l2"), "mse", 1),
    "activity": (*VECTOR, vector_model(activity_regularizer="l2"), "mse", 1),
    "adds a mean": (*VECTOR, adding(lambda x: keras.ops.mean(x**2)), "mse", 1),
    "adds a sum": (*VECTOR, adding(lambda x: 0.02 * keras.ops.sum(x**2)), "mse", 1),
    "adds a vector": (*VECTOR, adding(lambda x: 0.02 * keras.ops.sum(x**2, axis=-1)), "mse", 1),
    "own step": (*VECTOR, lambda: OwnStep([keras.Input((5,)), dense(2)]), "mse", 1),
    "own loss": (*VECTOR, lambda: OwnLoss([keras.Input((5,)), dense(2)]), None, 0),
    "several outputs": (
        *(numbers(STEPS, 5), lambda n: {"map": numbers(STEPS, 2, seed=2)(n), "label": classes()(n)}),
        *(several_outputs, lambda: {"map": "mse", "label": "sparse_categorical_crossentropy"}, None),
    ),
}
WEIGHTS = ("none", "one a sample", "one a value")
SOURCES = ("arrays", "tf batches", "tf samples", "PyDataset", "generator")
MODES = ("eager", "graph", "two steps at once")


def combinations():
    every = [
        each
        for each in itertools.product(TASKS, WEIGHTS, SOURCES, LENGTHS, MODES)
        if each[1] == "none" or TASKS[each[0]][4] is not None
    ]
    every = [each for each in every if not (each[1] == "one a value" and (TASKS[each[0]][4] or 0) < 2)]
    every = [each for each in every if not (each[1] != "none" and TASKS[each[0]][4] == 0)]
    # Of a generator Keras takes two steps at once beyond the end of what is called an epoch.
    every = [each for each in every if each[2] != "generator" or each[4] != MODES[2]]
    if os.environ.get("HVDTRAIN_TESTS") == "full":
        return every
    # Every task with one of the last batches that are not full, and by turns all else.
    chosen = random.Random(5)
    quick = [each for each in every if each[4] == "eager" or chosen.random() < 0.1]
    found = [
        chosen.choice([e for e in quick if e[0] == task and e[3] == length])
        for task in TASKS
        for length in LENGTHS[1:]
    ]
    found = [found[2 * place + place % 2] for place in range(len(TASKS))]
    found += [
        chosen.choice([e for e in every if e[1] == weights and e[2] == source])
        for weights in WEIGHTS
        for source in SOURCES
    ]
    # `make test` runs every third.
    return [
        pytest.param(*each, marks=[pytest.mark.slow] * (place % 3 > 0))
        for place, each in enumerate(sorted(set(found)))
    ]


class Batches(keras.utils.PyDataset):
    """The global batches in their order: what one process trains on."""

    def __init__(self, parts, length):
        super().__init__()
        self.parts, self.length = parts, length

    def __len__(self):
        return -(-self.length // BATCH)

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return keras.tree.map_structure(lambda leaf: leaf[rows], self.parts)


def sharded(parts, length, source):
    if source == "arrays":
        return hvd.shard(parts, BATCH, shuffle=False)
    if source == "tf batches":
        return hvd.shard(tf.data.Dataset.from_tensor_slices(parts).batch(BATCH))
    if source == "tf samples":
        return hvd.shard(tf.data.Dataset.from_tensor_slices(parts), BATCH)
    if source == "PyDataset":
        return hvd.shard(Batches(parts, length), shuffle=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = Batches(parts, length)
        return hvd.shard((batches[step] for _ in range(EPOCHS) for step in range(len(batches))), BATCH)


def metric_of(task):
    """A metric that takes the task's targets."""
    return "accuracy" if TASKS[task][1](1).dtype.kind == "i" else "mse"


def train(task, data, optimizer, mode, steps=None, callbacks=()):
    make, loss, axes = TASKS[task][2:]
    keras.utils.set_random_seed(3)
    model = make()
    metrics = None if task in ("own step", "own loss", "several outputs") else [metric_of(task)]
    model.compile(
        optimizer,
        loss() if callable(loss) else loss,
        metrics=metrics,
        weighted_metrics=metrics if axes else None,
        run_eagerly=mode == "eager",
        steps_per_execution=2 if mode == "two steps at once" else 1,
    )
    history = model.fit(
        data, epochs=EPOCHS, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=list(callbacks)
    )
    return model, history.history


def data_of(task, weights, length):
    x, y = TASKS[task][0](length), TASKS[task][1](length)
    if weights == "none":
        return x, y
    axes = TASKS[task][4]
    shape = (length, *np.shape(y)[1:axes]) if weights == "one a value" else (length, *[1] * (axes - 1))
    return x, y, np.random.default_rng(7).uniform(0.1, 3, shape)


@pytest.mark.parametrize(("task", "weights", "source", "length", "mode"), combinations())
def test_ranks_learn_what_one_process_learns(engine, task, weights, source, length, mode):
    parts = data_of(task, weights, length)
    steps = -(-length // BATCH) if source == "generator" else None
    ours, history = train(
        task,
        sharded(parts, length, source),
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)),
        mode,
        steps,
        hvd.callbacks.distributed(),
    )
    theirs, expected = train(task, Batches(parts, length), keras.optimizers.SGD(0.1), mode)
    for mine, alone in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, alone, rtol=1e-9, atol=1e-11)
    assert history.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-9, err_msg=name)


def dice(y_true, y_pred):
    return 1 - 2 * tf.reduce_sum(y_true * y_pred) / (tf.reduce_sum(y_true) + tf.reduce_sum(y_pred))


def compares_samples(y_true, y_pred):
    return tf.reduce_mean(tf.matmul(y_pred, y_pred, transpose_b=True) ** 2, axis=-1)


@pytest.mark.parametrize(
    ("loss", "layer", "named"),
    [
        (dice, None, "loss 'dice'"),
        (keras.losses.Tversky(), None, "loss 'tversky'"),
        (compares_samples, None, "loss 'compares_samples'"),
        ("mse", lambda x: keras.ops.std(x), "number 1 of the losses from add_loss"),
        ("mse", None, None),
        (sum_of_batch, lambda x: keras.ops.sum(x**2), None),
    ],
)
def test_losses_that_do_not_follow_from_the_samples_are_named_once(engine, capfd, loss, layer, named):
    x, y = numbers(5)(21), classes(2, count=2)(21).astype("float64")
    keras.utils.set_random_seed(3)
    layers = [keras.Input((5,)), dense(2, "sigmoid"), *([Adds(layer)] if layer else [])]
    model = keras.Sequential(layers)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss)
    for _ in range(2):
        model.fit(hvd.shard((x, y), BATCH), epochs=2, verbose=0)
    said = capfd.readouterr().err
    expected = named is not None and engine.size > 1 and engine.rank == 0
    assert said.count("does not follow from the samples one by one") == expected
    assert not expected or named in said


def test_weights_along_another_axis_than_the_samples_are_refused(engine, several):
    x, y, weight = numbers(STEPS, 5)(24), numbers(STEPS, 1)(24), np.ones(24)
    keras.utils.set_random_seed(3)
    model = sequence_model()()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse", run_eagerly=True)
    with pytest.raises(ValueError, match=r"sample_weight of shape \(batch\), losses of shape \(batch, 4\)"):
        model.fit(hvd.shard((x, y, weight), STEPS * engine.size), verbose=0)
