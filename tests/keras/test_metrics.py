"""Logs, History and what evaluate returns: the metrics of one process that has seen all samples."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.keras as hvd
from hvdtrain.data import shard
from hvdtrain.keras.callbacks.metric_average import MetricAverageCallback

pytestmark = pytest.mark.ranks

ROWS = 23  # on no number of ranks do they divide


@pytest.fixture
def several(world):
    if world.size() == 1:
        pytest.skip("a world of one has nothing to combine")


@pytest.fixture
def samples():
    random = np.random.default_rng(3)
    x = random.standard_normal((ROWS, 5)).astype("float32")
    return x, random.integers(0, 3, ROWS)


def mine(*arrays):
    """Uneven parts: the last rank has most."""
    ends = [ROWS * (rank + 1) ** 2 // hvd.size() ** 2 for rank in range(-1, hvd.size())]
    return [each[ends[hvd.rank()] : ends[hvd.rank() + 1]] for each in arrays]


@keras.saving.register_keras_serializable("tests")
class Hits(keras.metrics.Metric):
    """Counts, in two variables of two dtypes, one made at the first batch."""

    def __init__(self, name="hits", **kwargs):
        super().__init__(name=name, **kwargs)
        self.right = self.add_weight(shape=(), initializer="zeros", dtype="int32", name="right")

    def update_state(self, y_true, y_pred, sample_weight=None):
        if not hasattr(self, "seen"):
            self.seen = self.add_weight(shape=(2,), initializer="zeros", name="seen")
        hit = tf.argmax(y_pred, -1) == tf.cast(tf.reshape(y_true, [-1]), tf.int64)
        self.right.assign_add(tf.reduce_sum(tf.cast(hit, tf.int32)))
        self.seen.assign_add(tf.cast(tf.stack([tf.size(hit), 1 * tf.size(hit)]), "float32"))

    def result(self):
        return {"hits": self.right, "rate": tf.cast(self.right, "float32") / self.seen[0]}


class Largest(keras.metrics.Metric):
    def __init__(self, start="zeros", name="largest"):
        super().__init__(name=name)
        self._start = start
        self.value = self.add_weight(shape=(), initializer="zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(tf.maximum(self.value, tf.reduce_max(y_pred)))

    def result(self):
        return self.value


class FromMinusInfinity(Largest):
    def reset_state(self):
        self.value.assign(-np.inf)


class Declared(Largest):
    hvdtrain_combine = "max"


class OwnWay(Largest):
    def hvdtrain_combine(self, states):
        return [max(value for (value,) in states)]


class Remembers(keras.metrics.Metric):
    """Keeps what it saw outside of variables."""

    def __init__(self, name="remembers"):
        super().__init__(name=name)
        self.seen = 0

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.seen += 1

    def result(self):
        return tf.constant(1.0)

    def reset_state(self):
        self.seen = 0


class FromOne(Largest):
    def reset_state(self):
        self.value.assign(1.0)


class Confusion(keras.metrics.MeanIoU):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_true, tf.argmax(y_pred, -1), sample_weight)


def flat_probability(y_true, y_pred):
    return tf.reduce_max(y_pred, -1)


def all_metrics():
    one_hot = lambda y: tf.one_hot(tf.reshape(tf.cast(y, tf.int32), [-1]), 3)  # noqa: E731

    def on_one_hot(kind, **options):
        class OneHot(kind):
            def update_state(self, y_true, y_pred, sample_weight=None):
                return super().update_state(one_hot(y_true), y_pred, sample_weight)

        return OneHot(**options)

    metrics = keras.metrics
    return [
        "accuracy",
        flat_probability,
        on_one_hot(metrics.AUC, name="auc"),
        on_one_hot(metrics.AUC, name="pr", curve="PR", multi_label=True, num_labels=3, num_thresholds=50),
        on_one_hot(metrics.Precision, name="precision", thresholds=[0.3, 0.5]),
        on_one_hot(metrics.Recall, name="recall", class_id=1),
        on_one_hot(metrics.F1Score, name="f1", average="macro"),
        on_one_hot(metrics.F1Score, name="f1_each"),
        on_one_hot(metrics.SensitivityAtSpecificity, name="sensitivity", specificity=0.5),
        on_one_hot(metrics.R2Score, name="r2"),
        on_one_hot(metrics.RootMeanSquaredError, name="rmse"),
        on_one_hot(metrics.CosineSimilarity, name="cosine"),
        Confusion(num_classes=3, name="iou"),
        Hits(),
        Declared(name="declared"),
        OwnWay(name="own_way"),
        FromMinusInfinity(name="from_minus_infinity"),
    ]


def classifier(metrics=(), eager=False, **options):
    """A model that a step with learning rate 0 does not change."""
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, "softmax")])
    loss = "sparse_categorical_crossentropy"
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)),
        loss,
        metrics=list(metrics),
        run_eagerly=eager,
        **options,
    )
    return model


def alone(model_of, x, y, **options):
    """What one process reports that sees all samples."""
    model = model_of()
    plain = keras.Sequential(model.layers)
    plain.compile(keras.optimizers.SGD(0.0), model.loss, metrics=all_metrics(), run_eagerly=True, **options)
    return plain.evaluate(x, y, batch_size=ROWS, return_dict=True, verbose=0)


def assert_equal_logs(ours, theirs, rtol=2e-5):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=rtol, atol=1e-6, err_msg=name)
    for each in hvd.allgather_object({name: np.asarray(value).tobytes() for name, value in ours.items()}):
        assert each == {name: np.asarray(value).tobytes() for name, value in ours.items()}


class Seen(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.epochs, self.tests, self.ends = [], [], []

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(dict(logs))

    def on_test_end(self, logs=None):
        self.tests.append(dict(logs))

    def on_train_end(self, logs=None):
        self.ends.append(dict(logs))


@pytest.mark.slow
def test_training_and_validation_report_what_one_process_would(samples):
    x, y = samples
    ours = mine(x, y)
    model, seen = classifier(all_metrics()), Seen()
    history = model.fit(
        *ours,
        batch_size=len(ours[0]),
        epochs=2,
        verbose=0,
        validation_data=tuple(mine(x[::-1], y[::-1])),
        callbacks=[MetricAverageCallback(), seen],
    ).history
    expected = alone(classifier, x, y)
    for epoch in range(2):
        logs = seen.epochs[epoch]
        assert_equal_logs({k: v for k, v in logs.items() if not k.startswith("val_")}, expected)
        assert_equal_logs({k[4:]: v for k, v in logs.items() if k.startswith("val_")}, expected)
        for name, values in history.items():
            np.testing.assert_array_equal(values[epoch], logs[name])
    assert_equal_logs(seen.tests[0], expected)
    np.testing.assert_array_equal(seen.ends[0]["loss"], history["loss"][-1])


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        (Largest, "changes it differently the second time"),
        (Remembers, "keeps nothing in variables"),
        (FromOne, "'value' starts neither from 0"),
    ],
)
def test_a_state_that_cannot_be_combined_is_named_on_all_ranks(samples, metric, reason, eager):
    if eager and metric is not Largest:
        pytest.skip("the same in a graph")
    model = classifier([metric()], eager)
    with pytest.raises(
        ValueError, match=f"{metric.__name__}.* cannot be combined.*{reason}.*hvdtrain_combine"
    ):
        model.fit(*mine(*samples), verbose=0, callbacks=[MetricAverageCallback()])


@pytest.mark.usefixtures("several")
def test_a_declaration_that_is_no_operation(samples):
    metric = Declared()
    metric.hvdtrain_combine = "median"
    with pytest.raises(ValueError, match=r"must be one of 'sum', 'max', 'min'.*'median'"):
        classifier([metric], True).fit(*mine(*samples), verbose=0, callbacks=[MetricAverageCallback()])


def test_local_states_go_on_after_they_were_combined(samples):
    """The next batch adds to what this rank has seen, not to what all have."""
    x, y = mine(*samples)
    model = classifier(["accuracy"], eager=True)
    callback = MetricAverageCallback()
    model.fit(x, y, batch_size=len(x), verbose=0, callbacks=[callback])
    assert float(model.metrics[0].count) == len(x)
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    for times in (1, 2, 3):
        model._get_metrics_result_or_logs({})
        assert float(model.metrics[0].count) == len(x) * times
        model.test_step((x, y))
    callback.on_train_end()
    assert "_get_metrics_result_or_logs" not in vars(model)


def test_evaluations_of_ones_own_in_a_callback_stay_ones_own(samples):
    class Own(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if hvd.rank() == hvd.size() - 1:
                self.result = self.model.evaluate(*samples, verbose=0)

    own = Own()
    classifier(eager=True).fit(*mine(*samples), verbose=0, callbacks=[MetricAverageCallback(), own])
    if hvd.rank() == hvd.size() - 1:
        np.testing.assert_allclose(own.result, classifier(eager=True).evaluate(*samples, verbose=0))


def test_two_callbacks_combine_once(samples):
    x, y = samples
    callbacks = [MetricAverageCallback(), MetricAverageCallback()]
    model = classifier()
    model.compile("sgd", model.loss, metrics=[Total()], run_eagerly=True)
    logs = model.evaluate(*mine(x, y), verbose=0, callbacks=callbacks, return_dict=True)
    assert logs["total"] == ROWS
    assert "_get_metrics_result_or_logs" not in vars(model)


class Total(keras.metrics.Sum):
    def __init__(self):
        super().__init__(name="total")

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(tf.ones(tf.shape(y_true)))


class OwnStep(keras.Model):
    """As the variational autoencoder of Keras' examples: trackers of its own, returned under other names."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.error = keras.metrics.Mean(name="total_loss")
        self.buckets = keras.metrics.AUC(name="auc", num_thresholds=20)

    @property
    def metrics(self):
        return [self.error, self.buckets]

    def call(self, x):
        return tf.sigmoid(self.dense(x))

    def step(self, batch):
        x, y = batch
        y = tf.cast(y == 1, "float32")
        predicted = tf.reshape(self(x), [-1])
        self.error.update_state(tf.abs(predicted - y))
        self.buckets.update_state(y, predicted)
        return {"loss": self.error.result(), "area": self.buckets.result(), "last": tf.reduce_mean(predicted)}

    train_step = test_step = step


def test_what_a_train_step_of_ones_own_returns(samples):
    def built():
        keras.utils.set_random_seed(1)
        model = OwnStep()
        model.compile("sgd", run_eagerly=True)
        model(samples[0])
        return model

    x, y = mine(*samples)
    logs = built().fit(x, y, batch_size=len(x), verbose=0, callbacks=[MetricAverageCallback()]).history
    expected = built().evaluate(*samples, batch_size=ROWS, verbose=0, return_dict=True)
    for name in ("loss", "area"):
        np.testing.assert_allclose(logs[name][0], expected[name], rtol=1e-5)
    np.testing.assert_allclose(np.mean(hvd.allgather(np.array(logs["last"][0]))), logs["last"][0])


def test_what_another_callback_put_into_the_logs_is_averaged(samples):
    class Adds(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["rank"], logs["same"] = float(hvd.rank()), 0.1

    x, y = (each[:4] for each in samples)
    seen = Seen()
    callbacks = [Adds(), MetricAverageCallback(), seen]
    classifier(eager=True).fit(x, y, verbose=0, callbacks=callbacks)
    np.testing.assert_allclose(seen.epochs[0]["rank"], (hvd.size() - 1) / 2)
    assert seen.epochs[0]["same"] == 0.1


@pytest.mark.usefixtures("several")
def test_the_rank_where_numbers_end_is_named(samples, capfd):
    x, y = (each.copy() for each in mine(*samples))
    last = hvd.size() - 1
    if hvd.rank() == last:
        x[-1] = np.nan
    model = classifier(eager=True)
    history = model.fit(
        x, y, batch_size=len(x), epochs=2, verbose=0, callbacks=[MetricAverageCallback()]
    ).history
    assert np.isnan(history["loss"]).all()
    said = capfd.readouterr().err
    told = f"in the training of epoch 1, from batch 1 on, first on rank {last}."
    assert said.count(told) == (hvd.rank() == 0)


@pytest.mark.usefixtures("several")
def test_a_function_with_one_number_for_a_batch_is_reported_once(samples, capfd):
    def largest_of_batch(y_true, y_pred):
        return tf.reduce_max(y_pred)

    x, y = (each[:6] for each in samples)
    model = classifier([largest_of_batch, flat_probability], eager=True)
    model.fit(x, y, batch_size=3, epochs=2, verbose=0, callbacks=[MetricAverageCallback()])
    said = capfd.readouterr().err
    assert said.count("largest_of_batch in the logs: the function returns one number for a batch") == (
        hvd.rank() == 0
    )
    assert "flat_probability" not in said


def test_padding_and_weights_count_as_in_one_process(samples):
    """hvd.shard fills the last batch up; neither loss nor metrics see it, weighted or not."""
    x, y = samples
    weight = np.linspace(0.5, 2, ROWS).astype("float32")
    both = {"weighted_metrics": ["accuracy"], "metrics": ["accuracy", Confusion(num_classes=3, name="iou")]}
    model = classifier()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), model.loss, run_eagerly=True, **both)
    data = shard((x, y, weight), batch_size=4 * hvd.size(), shuffle=True, seed=2)
    history = model.fit(data, verbose=0, callbacks=[MetricAverageCallback()], validation_data=data).history
    plain = keras.Sequential(model.layers)
    both["metrics"] = ["accuracy", Confusion(num_classes=3, name="iou")]
    plain.compile("sgd", model.loss, run_eagerly=True, **both)
    expected = plain.evaluate(x, y, sample_weight=weight, verbose=0, return_dict=True)
    for name, value in expected.items():
        np.testing.assert_allclose(history[name][0], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(history["val_" + name][0], value, rtol=1e-5, err_msg=name)
