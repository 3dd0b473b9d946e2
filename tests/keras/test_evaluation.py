"""hvd.evaluate and hvd.predict: what one process returns, with each rank at a part of the work."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.keras as hvd

pytestmark = pytest.mark.ranks

ROWS, BATCH = 43, 8  # 6 batches, the last one of 3 rows


@pytest.fixture
def several(world):
    if world.size() == 1:
        pytest.skip("a world of one has nothing to divide")


@pytest.fixture
def samples():
    random = np.random.default_rng(3)
    x = random.standard_normal((ROWS, 5)).astype("float32")
    return x, random.integers(0, 2, (ROWS, 1)).astype("float32")


@pytest.fixture
def weight():
    return np.linspace(0.5, 2, ROWS).astype("float32")


def mean_prediction(y_true, y_pred):
    """One number for a batch, as many write a metric."""
    return tf.reduce_mean(y_pred)


class Seen(keras.metrics.Sum):
    """Counts samples."""

    def __init__(self):
        super().__init__(name="seen")

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(tf.ones(tf.shape(y_true)[:1]))


class F1(keras.metrics.Metric):
    """Made of two metrics inside it, as people write it."""

    def __init__(self):
        super().__init__(name="own_f1")
        self.precision, self.recall = keras.metrics.Precision(), keras.metrics.Recall()

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.precision.update_state(y_true, y_pred, sample_weight)
        self.recall.update_state(y_true, y_pred, sample_weight)

    def result(self):
        precision, recall = self.precision.result(), self.recall.result()
        return 2 * precision * recall / (precision + recall + 1e-7)

    def reset_state(self):
        self.precision.reset_state()
        self.recall.reset_state()


def compiled(optimizer=None, eager=False):
    keras.utils.set_random_seed(5)
    regularized = keras.layers.Dense(1, "sigmoid", kernel_regularizer=keras.regularizers.L2(0.1))
    model = keras.Sequential([keras.Input((5,)), regularized])
    metrics = keras.metrics
    model.compile(
        optimizer or "sgd",
        "binary_crossentropy",
        metrics=[
            "accuracy",
            metrics.AUC(name="auc"),
            metrics.F1Score(threshold=0.5, name="f1"),
            metrics.R2Score(name="r2"),
            metrics.BinaryIoU(name="iou"),
            F1(),
            Seen(),
            mean_prediction,
        ],
        weighted_metrics=[metrics.BinaryAccuracy(name="weighted")],
        run_eagerly=eager,
    )
    return model


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, weight):
        super().__init__()
        self.parts, self.made = (x, y, weight), []

    def __len__(self):
        return -(-ROWS // BATCH)

    def __getitem__(self, index):
        self.made.append(index)
        return tuple(each[index * BATCH : (index + 1) * BATCH] for each in self.parts)


def batches(*arrays):
    for start in range(0, ROWS, BATCH):
        yield tuple(each[start : start + BATCH] for each in arrays)


def assert_one_result(ours, theirs, rtol=1e-5):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=rtol, err_msg=name)
    for each in hvd.allgather_object(ours):
        np.testing.assert_equal(each, ours)


class Steps(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.count = 0

    def on_test_batch_end(self, batch, logs=None):
        self.count += 1

    def on_test_end(self, logs=None):
        self.logs = dict(logs)


def kinds(x, y, weight):
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weight))
    return {
        "arrays": ((x, y, weight), {"batch_size": BATCH}),
        "beside": (x, {"y": y, "sample_weight": weight, "batch_size": BATCH}),
        "dataset": (dataset.batch(BATCH), {}),
        "samples": (dataset, {"batch_size": BATCH}),
        "filtered": (dataset.batch(BATCH).filter(lambda *_: True), {}),  # of a length that nobody knows
        "pydataset": (Batches(x, y, weight), {}),
        "generator": (batches(x, y, weight), {}),
        "endless": (dataset.batch(BATCH).repeat(), {"steps": 6}),
    }


@pytest.mark.parametrize(
    "kind",
    ["arrays", "dataset", "pydataset", "endless"]
    + [pytest.param(kind, marks=pytest.mark.slow) for kind in ("beside", "samples", "filtered", "generator")],
)
def test_evaluate_returns_what_one_process_does(samples, weight, kind):
    data, options = kinds(*samples, weight)[kind]
    steps = Steps()
    ours = hvd.evaluate(compiled(eager=True), data, verbose=0, callbacks=[steps], return_dict=True, **options)
    x, y = samples
    plain = compiled(eager=True)
    theirs = plain.evaluate(x, y, BATCH, sample_weight=weight, verbose=0, return_dict=True)
    assert_one_result(ours, theirs)
    assert ours["seen"] == ROWS and steps.logs == ours
    assert sum(hvd.allgather_object(steps.count)) == 6
    assert max(hvd.allgather_object(steps.count)) == -(-6 // hvd.size())


def test_a_list_as_keras_returns_it_and_twice_the_same(samples):
    model = compiled()
    expected = np.hstack(compiled().evaluate(*samples, BATCH, verbose=0))
    for _ in range(2):
        ours = hvd.evaluate(model, samples, batch_size=BATCH, verbose=0)
        np.testing.assert_allclose(np.hstack(ours), expected, rtol=1e-5)
    assert "_get_metrics_result_or_logs" not in vars(model)
    np.testing.assert_allclose(np.hstack(model.evaluate(*samples, BATCH, verbose=0)), expected, rtol=1e-5)


def test_steps_are_those_of_all_ranks(samples, weight):
    x, y = samples
    expected = compiled(eager=True).evaluate(
        x[: 3 * BATCH], y[: 3 * BATCH], BATCH, verbose=0, return_dict=True
    )
    for data, options in ((samples, {"batch_size": BATCH}), (batches(x, y), {})):
        ours = hvd.evaluate(compiled(eager=True), data, steps=3, verbose=0, return_dict=True, **options)
        assert_one_result(ours, expected)


def test_fewer_samples_than_ranks(samples):
    x, y = (each[:1] for each in samples)
    expected = compiled(eager=True).evaluate(x, y, verbose=0, return_dict=True)
    for data in ((x, y), tf.data.Dataset.from_tensors((x, y)), iter([(x, y)])):
        assert_one_result(hvd.evaluate(compiled(eager=True), data, verbose=0, return_dict=True), expected)


def test_what_shard_returned(samples, weight):
    data = hvd.shard((*samples, weight), batch_size=4 * hvd.size(), shuffle=True)
    ours = hvd.evaluate(compiled(), data, verbose=0, return_dict=True)
    x, y = samples
    theirs = compiled().evaluate(x, y, 4 * hvd.size(), sample_weight=weight, verbose=0, return_dict=True)
    theirs["mean_prediction"] = ours["mean_prediction"]  # a mean over batches, which are others
    assert_one_result(ours, theirs)


def several_outputs():
    keras.utils.set_random_seed(5)
    first, second = keras.Input((5,), name="first"), keras.Input((5,), name="second")
    both = keras.layers.Concatenate()([first, second])
    outputs = {"a": keras.layers.Dense(2)(both), "b": (keras.layers.Dense(1)(first), second)}
    return keras.Model([first, second], outputs)


def test_weighted_losses_of_several_outputs(samples, weight):
    def built(eager):
        keras.utils.set_random_seed(5)
        first, second = keras.Input((5,)), keras.Input((5,))
        both = keras.layers.Concatenate()([first, second])
        outputs = {"a": keras.layers.Dense(2)(both), "b": keras.layers.Dense(1)(both)}
        model = keras.Model([first, second], outputs)
        metrics = {"a": ["mae"], "b": [keras.metrics.CosineSimilarity(axis=0)]}
        model.compile(
            "sgd",
            {"a": "mse", "b": "mae"},
            metrics=metrics,
            loss_weights={"a": 0.3, "b": 2.0},
            run_eagerly=eager,
        )
        return model

    x, y = samples
    data = ([x, x[::-1]], {"a": np.hstack([y, 2 * y]), "b": y}, weight)
    for eager in (False, True):
        ours = hvd.evaluate(built(eager), data, batch_size=BATCH, verbose=0, return_dict=True)
        theirs = built(eager).evaluate(*data[:2], BATCH, sample_weight=weight, verbose=0, return_dict=True)
        assert_one_result(ours, theirs)


@pytest.mark.parametrize(
    "kind", ["arrays", "dataset", "samples", "filtered", "pydataset", "generator", "endless"]
)
@pytest.mark.parametrize("root", [None, 0], ids=["all", "rank 0"])
def test_predict_returns_the_whole_in_order(samples, weight, kind, root):
    x, _ = samples
    data, options = kinds(*samples, weight)[kind]
    data = x if kind == "arrays" else data.map(lambda x, *_: x) if kind == "samples" else data
    if kind == "samples":
        data, options = data.batch(BATCH), {}
    model = compiled(eager=True)
    ours = hvd.predict(model, data, verbose=0, root_rank=root, **options)
    if root is None or hvd.rank() == root:
        assert isinstance(ours, np.ndarray)
        np.testing.assert_allclose(ours, model.predict(x, BATCH, verbose=0), rtol=1e-6)
    else:
        assert ours is None
    if kind == "pydataset":
        assert set(data.made) == set(range(hvd.rank(), 6, hvd.size()))


@pytest.mark.parametrize("rows", [1, 33, ROWS])
def test_predictions_in_a_nest(samples, rows):
    x = [samples[0][:rows], samples[0][::-1][:rows]]
    model = several_outputs()
    ours = hvd.predict(model, x, batch_size=BATCH, verbose=0)
    theirs = model.predict(x, verbose=0)
    keras.tree.assert_same_structure(ours, theirs)
    for mine, other in zip(keras.tree.flatten(ours), keras.tree.flatten(theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


class Doubled(keras.Sequential):
    """Its predict_step looks at the whole batch, and returns texts too."""

    def predict_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        return {"both": tf.concat([self(x), y], -1), "text": tf.strings.as_string(y)}


def test_a_predict_step_of_ones_own(samples):
    model = Doubled([keras.Input((5,)), keras.layers.Dense(1)])
    hvd.broadcast_variables(model.weights, root_rank=0)
    data = tf.data.Dataset.from_tensor_slices(samples).batch(BATCH)
    ours, theirs = hvd.predict(model, data), model.predict(data, verbose=0)
    np.testing.assert_allclose(ours["both"], theirs["both"], rtol=1e-6)
    np.testing.assert_array_equal(ours["text"], theirs["text"])


@pytest.mark.usefixtures("several")
def test_ranks_that_hold_different_models_or_data_are_told(samples):
    x, y = samples
    model = compiled(eager=True)
    for function in (hvd.evaluate, hvd.predict):
        with pytest.raises(hvd.MismatchError, match=r"the number of samples differs.*\n.*rank 0: 43"):
            function(
                model,
                x[: ROWS - hvd.rank()]
                if function is hvd.predict
                else (x[: ROWS - hvd.rank()], y[: ROWS - hvd.rank()]),
            )
    if hvd.rank() == 1:
        model.layers[0].bias.assign([1.0])
    for function in (hvd.evaluate, hvd.predict):
        with pytest.raises(hvd.MismatchError, match=r"weight .*bias differs[\s\S]*broadcast_variables"):
            function(model, samples)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("function", [hvd.evaluate, hvd.predict])
def test_an_error_on_one_rank_reaches_all(samples, weight, function):
    class Corrupt(Batches):
        def __getitem__(self, index):
            if index == hvd.size() + 1:  # on rank 1, in its second batch
                raise OSError("unreadable")
            return super().__getitem__(index)

    failed = hvd.rank() == 1
    error = OSError if failed else RuntimeError if function is hvd.predict else hvd.MismatchError
    with pytest.raises(Exception, match="unreadable") as caught:
        function(compiled(eager=True), Corrupt(*samples, weight), verbose=0)
    assert failed or isinstance(caught.value, error)


@pytest.mark.usefixtures("several")
def test_a_state_that_cannot_be_combined(samples):
    class Largest(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="largest")
            self.value = self.add_weight(shape=(), initializer="zeros", name="value")

        def update_state(self, y_true, y_pred, sample_weight=None):
            self.value.assign(tf.maximum(self.value, tf.reduce_max(y_pred)))

        def result(self):
            return self.value

    model = compiled()
    model.compile("sgd", "mse", metrics=[Largest()], run_eagerly=True)
    with pytest.raises(ValueError, match=r"'largest' \(Largest\) cannot be combined over the ranks"):
        hvd.evaluate(model, samples, verbose=0)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ((np.zeros((0, 5)), np.zeros((0, 1))), "no samples"),
        ((np.zeros((3, 5)), np.zeros((4, 1))), "same number of samples"),
        (lambda: tf.data.Dataset.from_tensors((np.zeros((3, 5)), np.zeros((3, 1)))).repeat(), "endless"),
        (lambda: tf.data.Dataset.range(9).shuffle(9).batch(3), "its own order"),
    ],
)
@pytest.mark.parametrize("function", [hvd.evaluate, hvd.predict])
def test_data_that_cannot_be_divided(data, match, function):
    tf.random.set_seed(None)  # which would give an order to a shuffle without one
    data = data() if callable(data) else data  # a dataset would start TensorFlow while tests are collected
    if function is hvd.predict and isinstance(data, tuple):
        data = data[0] if len(data[0]) == 0 else data
    with pytest.raises(ValueError, match=match):
        function(compiled(), data)
