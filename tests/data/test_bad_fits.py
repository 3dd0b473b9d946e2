"""What only one rank has or lacks in `fit`: an error on all ranks, in seconds, that names rank and cause."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.keras as hvd
from hvdtrain import runtime

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("several")]

X, Y = np.random.default_rng(0).standard_normal((32, 4)).astype("float32"), np.zeros(32, "float32")
ODD = 1  # the rank that has something else than the others


@pytest.fixture(autouse=True)
def ranks_can_go_on():
    yield
    assert hvd.allgather_object(1) == [1] * hvd.size()


@pytest.fixture(params=["plain callbacks"])
def fit(request):
    """Fits a small model, in a graph where it has `hvd.callbacks.distributed`; returns what it raised."""

    def run(x, y=None, metrics=("mae",), callbacks=(), **options):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="ones")])
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01))
        model.compile(optimizer, "mse", metrics=list(metrics), run_eagerly=request.param == "plain callbacks")
        callbacks = list(callbacks)
        if request.param == "distributed callbacks":
            callbacks = hvd.callbacks.distributed(callbacks)
        with pytest.raises(Exception) as caught:
            model.fit(x, y, callbacks=callbacks, verbose=0, **{"batch_size": 8} | options)
        return caught.value

    return run


both = pytest.mark.parametrize("fit", ["plain callbacks", "distributed callbacks"], indirect=True)


def odd(value, others):
    return value if hvd.rank() == ODD else others


def everywhere(error, *patterns):
    """All ranks have got the same explanation, in which each pattern is found."""
    hidden = runtime.engine().last_error
    text = str(error if isinstance(error, hvd.MismatchError) else hidden)
    assert isinstance(error, hvd.MismatchError) or text in str(error), error
    for pattern in patterns:
        assert re.search(pattern, text, re.DOTALL), text
    assert hvd.allgather_object(text) == [text] * hvd.size()


def only_one(error, kind, words, told):
    """The odd rank has its own error, the others one that quotes it."""
    assert words in str(error)
    if hvd.rank() == ODD:
        assert isinstance(error, kind) and not isinstance(error, hvd.MismatchError)
    else:
        text = str(error)
        assert f"rank {ODD}: {told} raised {kind.__name__}" in text and "The other ranks cannot go on" in text


def test_a_number_of_samples_that_depends_on_the_rank(fit):
    count = odd(24, 32)
    error = fit(X[:count], Y[:count])
    everywhere(error, r"number of steps an epoch differs.*ranks? 0.*: 4\n.*rank 1: 3\n.*hvd\.shard\(\(x, y\)")


def test_fewer_samples_than_a_batch_on_one_rank(fit):
    """Three samples in the place of 32: a smaller batch would weigh as much as the others' whole ones."""
    count = odd(3, 32)
    everywhere(fit(X[:count], Y[:count]), "rank 1: 1\n", "cut all parts to the same length")


@both
def test_a_dataset_of_a_length_that_nobody_knows(fit):
    count = odd(16, 32)
    dataset = tf.data.Dataset.from_tensor_slices((X[:count], Y[:count])).filter(lambda x, y: True).batch(8)
    everywhere(fit(dataset, batch_size=None), r"rank 1: end of epoch 1 after 2 steps.*steps_per_epoch=2")


def test_other_steps_per_epoch(fit):
    error = fit(tf.data.Dataset.from_tensor_slices((X, Y)).repeat().batch(8), steps_per_epoch=odd(3, 4))
    everywhere(error, "number of steps an epoch differs.*rank 1: 3\n.*steps_per_epoch")


@pytest.mark.parametrize("steps", [None, 4])
def test_a_generator_that_ends_early(fit, steps):
    batches = ((X[:8], Y[:8]) for _ in range(odd(2, 4)))
    error = fit(batches, batch_size=None, steps_per_epoch=steps)
    everywhere(error, r"rank 1: end of epoch 1 after 2 steps.*steps_per_epoch=2")


def test_a_generator_that_ends_early_and_is_sharded(fit):
    batches = ((X[:8], Y[:8]) for _ in range(odd(2, 4)))
    error = fit(hvd.shard(batches, 8), batch_size=None)
    everywhere(error, r"rank 1: end of epoch 1 after 2 steps")


def test_another_number_of_epochs(fit):
    everywhere(fit(X, Y, epochs=odd(2, 3)), "number of epochs differs.*rank 1: from 0 to 2\n")
    everywhere(
        fit(X, Y, epochs=3, initial_epoch=odd(1, 0)), "number of epochs differs.*rank 1: from 1 to 3\n"
    )


def test_early_stopping_on_one_rank(fit):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = hvd.rank() == ODD

    everywhere(fit(X, Y, epochs=3, callbacks=[Stop()]), "rank 1: end of training")


@both
@pytest.mark.parametrize("hook", ["on_train_begin", "on_train_batch_end", "on_epoch_end", "on_train_end"])
def test_a_callback_that_raises(fit, hook, request):
    def fail(*args, **kwargs):
        if hvd.rank() == ODD:
            raise OSError("disk full")

    bad = keras.callbacks.LambdaCallback(**{hook: fail})
    told = f"LambdaCallback.{hook}" if "distributed" in request.node.name else "model.fit"
    error = fit(X, Y, epochs=2, callbacks=[bad])
    only_one(error, OSError, "disk full", told)


@both
def test_validation_on_one_rank(fit):
    error = fit(X, Y, validation_data=odd((X, Y), None))
    everywhere(
        error, "validation differs.*ranks? 0.*: has none\n.*rank 1: has data\n.*on every rank or on none"
    )


def test_a_metric_that_one_rank_lacks(fit):
    error = fit(X, Y, metrics=odd([], ["mae", keras.metrics.MeanSquaredError()]))
    everywhere(
        error,
        "list of metrics differs.*ranks? 0.*: MeanAbsoluteError, MeanSquaredError\n.*rank 1: none\n.*Compile",
    )


def test_logs_that_one_rank_lacks():
    class Own(keras.Sequential):
        def train_step(self, data):
            logs = super().train_step(data)
            return logs | odd({}, {"gap": logs["loss"]})

    model = Own([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse", run_eagerly=True)
    hvd.broadcast_variables(model.weights)
    with pytest.raises(hvd.MismatchError, match=r"(?s)ranks? 0.*: gap.*rank 1: loss"):
        model.fit(X, Y, verbose=0)


def test_metrics_that_keras_numbers_otherwise_are_the_same_metrics():
    if hvd.rank() == ODD:
        keras.metrics.AUC()  # Keras calls the next one auc_1
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, "sigmoid")])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01))
    model.compile(optimizer, "mse", metrics=[keras.metrics.AUC()], run_eagerly=True)
    hvd.broadcast_variables(model.weights)
    model.fit(X, Y, verbose=0)


@both
def test_a_corrupt_file(fit, tmp_path_factory):
    file = tmp_path_factory.mktemp("corrupt") / "records"
    with tf.io.TFRecordWriter(str(file)) as writer:
        for row in X:
            writer.write(row.tobytes())
    if hvd.rank() == ODD:
        content = bytearray(file.read_bytes())
        content[len(content) // 2 :] = b"?" * (len(content) - len(content) // 2)
        file.write_bytes(content)
    read = tf.data.TFRecordDataset(str(file)).map(lambda row: (tf.io.decode_raw(row, "float32"), 0.0))
    data = read.map(lambda x, y: (tf.ensure_shape(x, [4]), y)).batch(8)
    error = fit(data, batch_size=None)
    only_one(error, tf.errors.DataLossError, "corrupted record", "model.fit")


class Failing(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if hvd.rank() == ODD and index == 2:
            raise OSError("unreadable image")
        return X[:8], Y[:8]


def test_a_pydataset_that_raises(fit):
    error = fit(Failing(), batch_size=None, shuffle=False)
    assert "unreadable image" in str(error)


def test_what_all_ranks_raise_stays_what_it_is(fit):
    def fail(*args):
        raise KeyError(f"of rank {hvd.rank()}")

    error = fit(X, Y, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=fail)])
    assert isinstance(error, KeyError) and f"of rank {hvd.rank()}" in str(error)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"batch_size": 4}, "batch_size=4 has no effect .* Give the global batch to hvd.shard"),
        ({"batch_size": None, "validation_split": 0.25}, "validation_split=0.25 .* Divide the arrays before"),
    ],
)
def test_what_only_arrays_have_beside_sharded_data(fit, options, words):
    error = fit(hvd.shard((X, Y), 8), **options)
    assert isinstance(error, ValueError) and re.search(words, str(error)), error


def caught(function, *args):
    with pytest.raises(ValueError) as error:
        function(*args)
    return error.value


def cached(path, divided):
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    return (data.shard(hvd.size(), hvd.rank()) if divided else data).cache(path)


def test_a_batch_size_that_arrays_need_beside_sharded_validation_data():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
    validation = hvd.shard((X, Y), 8, shuffle=False)
    callbacks = hvd.callbacks.distributed()
    history = model.fit(X, Y, batch_size=8, validation_data=validation, verbose=0, callbacks=callbacks)
    assert "val_loss" in history.history


def test_ranks_that_cache_in_one_file(fit, tmp_path_factory):
    path = hvd.broadcast_object(str(tmp_path_factory.mktemp("cache") / "samples"))
    words = (
        rf"rank.* 0.* cache their data in the same file, {re.escape(path)}\. .*{re.escape(path)}-{{hvd.rank"
    )
    for start in (
        lambda: fit(cached(path, divided=True).batch(4), batch_size=None),
        lambda: fit(X, Y, validation_data=cached(path, divided=True).batch(4)),
        lambda: caught(hvd.shard, cached(path, divided=False), 8),
    ):
        error = start()
        assert isinstance(error, ValueError) and re.search(words, str(error)), error


def test_each_its_cache_file_or_one_that_is_complete(tmp_path_factory):
    folder = hvd.broadcast_object(str(tmp_path_factory.mktemp("cache")))
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
    callbacks = hvd.callbacks.distributed()
    model.fit(cached(f"{folder}/{hvd.rank()}", divided=True).batch(4), verbose=0, callbacks=callbacks)
    with hvd.first_overall():
        list(cached(f"{folder}/whole", divided=False))
    seen = [len(x) for x, *_ in hvd.shard(cached(f"{folder}/whole", divided=False), 8)]
    assert sum(hvd.allgather_object(sum(seen))) == len(X)
