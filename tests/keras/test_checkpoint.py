"""A training that was stopped and goes on ends as one that was not: the same to the bit, with the same history."""

import collections
import functools
import json
import os
import signal
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import StopAt, StoppedError

import hvdtrain.keras as hvd
from hvdtrain import stop_request
from hvdtrain.stop_request import Preempted

pytestmark = pytest.mark.ranks

ROWS, BATCH, EPOCHS = 92, 8, 3  # 12 steps an epoch, the last one with 4 rows


class Learns(keras.callbacks.Callback):
    """Keeps a state of its own, as people write it, and changes the learning rate by it."""

    def __init__(self):
        super().__init__()
        self.seen, self.best = 0, collections.defaultdict(list, loss=[np.inf])
        self.given = self.callback = 3  # names that callbacks of ours have too
        self.losses = self.alias = []
        self.random, self.kinds, self.count = np.random.default_rng(1), set(), keras.Variable(0)

    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = 0.01 / (1 + self.seen)

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        self.best["loss"].append(float(logs["loss"]) + self.random.random())
        self.losses.append(self.best["loss"][-1])
        self.kinds.add(self.seen % 5)
        self.count.assign_add(1)

    @property
    def learned(self):
        assert self.alias is self.losses and len(self.losses) == int(self.count)
        return self.losses, self.kinds, dict(self.best)


@pytest.fixture(autouse=True)
def nobody_asked(monkeypatch):
    monkeypatch.setattr(stop_request, "_asked", [])


def network(kind="built"):
    layers = keras.layers
    first = [keras.Input((5,))] if kind == "built" else []
    return keras.Sequential(
        [*first, layers.Dense(7, "relu"), layers.BatchNormalization(), layers.Dropout(0.3), layers.Dense(1)]
    )


def usual():
    return [
        keras.callbacks.EarlyStopping("val_loss", patience=5, min_delta=0.3, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", patience=0, factor=0.5, min_delta=0.2),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
    ]


@functools.cache
def whole(epochs=EPOCHS):
    """What a training ends with that nothing disturbs."""
    return training(epochs=epochs)


def arrays():
    x = np.random.default_rng(1).standard_normal((ROWS, 5)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)


def data():
    x, y = arrays()
    return hvd.shard((x, y), BATCH), hvd.shard((x[:20], y[:20]), BATCH, shuffle=False)


def training(folder=None, callbacks=(), kind="built", epochs=EPOCHS, optimizer=None, **asked):
    """Trains as a script does that has just been started; returns what it ends with."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    model = network(kind)
    model.compile(hvd.DistributedOptimizer(optimizer or keras.optimizers.Adam(0.01)), "mse", metrics=["mae"])
    samples, held_out = data()
    own = [hvd.callbacks.Checkpoint(folder, **asked)] if folder else []
    history = model.fit(
        samples,
        validation_data=held_out,
        epochs=epochs,
        verbose=0,
        callbacks=hvd.callbacks.distributed([*callbacks, *own]),
    )
    state = [each.numpy() for each in (*model.weights, *model.optimizer.variables)]
    return state, history.history, history.epoch


def assert_the_same(one, other):
    for mine, theirs in zip(one[0], other[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert one[1:] == other[1:]


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("built", [12, 24, 1]),
        pytest.param("built", [1, 2, 13], marks=pytest.mark.slow),
        pytest.param("built", [30], marks=pytest.mark.slow),
        pytest.param("unbuilt", [7, 8], marks=pytest.mark.slow),
    ],
)
def test_a_training_that_was_stopped_ends_as_one_that_was_not(folder, kind, steps):
    learns = Learns()
    undisturbed = training(callbacks=[*usual(), learns], kind=kind)
    for step in steps:
        with pytest.raises(StoppedError):
            training(folder, [*usual(), Learns(), StopAt(step)], kind, every_steps=1)
    again = Learns()
    assert_the_same(training(folder, [*usual(), again], kind, every_steps=5), undisturbed)
    assert again.learned == learns.learned


@pytest.mark.slow
def test_what_was_accumulated_and_averaged_goes_on_too(folder):
    def optimizer():
        return keras.optimizers.SGD(0.01, 0.9, gradient_accumulation_steps=3, use_ema=True, ema_momentum=0.9)

    undisturbed = training(optimizer=optimizer())
    for step in (4, 10):
        with pytest.raises(StoppedError):
            training(folder, [StopAt(step)], optimizer=optimizer(), every_steps=1)
    assert_the_same(training(folder, optimizer=optimizer(), every_steps=1), undisturbed)


class Rivals(keras.Model):
    """Two parts with an optimizer each, as in a GAN."""

    def __init__(self):
        super().__init__()
        self.one = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
        self.other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])

    def compile(self, one, other):
        super().compile()
        self.first_optimizer, self.second_optimizer = one, other

    def train_step(self, data):
        with tf.GradientTape(persistent=True) as tape:
            made = self.one(data[0])
            loss = tf.reduce_mean((self.other(made) - data[1]) ** 2)
        for part, optimizer in ((self.one, self.first_optimizer), (self.other, self.second_optimizer)):
            optimizer.apply(tape.gradient(loss, part.trainable_variables), part.trainable_variables)
        return {"loss": loss}


@pytest.mark.slow
def test_a_model_with_two_optimizers(folder):
    def run(callbacks):
        keras.utils.clear_session()
        keras.utils.set_random_seed(5)
        model = Rivals()
        optimizers = keras.optimizers.SGD(0.01, 0.9), keras.optimizers.Adam(0.01)
        model.compile(*(hvd.DistributedOptimizer(each) for each in optimizers))
        samples = hvd.shard(arrays(), BATCH, remainder="drop")
        model.fit(samples, epochs=2, verbose=0, callbacks=callbacks)
        trained = (*model.weights, *model.first_optimizer.variables, *model.second_optimizer.variables)
        return [each.numpy() for each in trained]

    with pytest.raises(StoppedError):
        run([StopAt(5), hvd.callbacks.Checkpoint(folder, every_steps=2)])
    for mine, theirs in zip(run([hvd.callbacks.Checkpoint(folder)]), run([]), strict=True):
        np.testing.assert_array_equal(mine, theirs)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return tuple(each[index * BATCH : (index + 1) * BATCH] for each in arrays())


def endless():
    while True:
        yield from (Batches()[index] for index in range(11))


# What is trained on, and further arguments of `compile`, `fit` and `DistributedOptimizer`.
OTHERS = {
    "shuffled tf.data": (lambda: tf_samples(shuffle=True), {}, {}, {}),
    "generator": (lambda: hvd.shard(endless(), BATCH), {}, {"steps_per_epoch": 11}, {}),
    "several steps at once": (None, {"steps_per_execution": 2}, {}, {}),
    "gradients of two steps": (None, {}, {"steps_per_epoch": 5}, {"backward_passes_per_step": 2}),
}
for name in ("topk", "randomk", "powersgd"):
    compression = getattr(hvd.Compression, name)(1 if name == "powersgd" else 0.2, min_size=2)
    OTHERS[name] = (None, {}, {}, {"compression": compression})
if os.environ.get("HVDTRAIN_TESTS") == "full":
    OTHERS |= {
        "tf.data": (lambda: tf_samples(), {}, {}, {}),
        "PyDataset": (lambda: hvd.shard(Batches(), BATCH), {}, {}, {}),
        "eager": (None, {"run_eagerly": True}, {}, {}),
        "left out": (lambda: hvd.shard(arrays(), BATCH, remainder="drop"), {}, {}, {}),
    }


def tf_samples(**options):
    return hvd.shard(tf.data.Dataset.from_tensor_slices(arrays()), BATCH, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_other_data_and_steps_go_on_too(folder, kind):
    make, compiling, fitting, wrapping = OTHERS[kind]

    def run(callbacks):
        keras.utils.clear_session()
        keras.utils.set_random_seed(5)
        model = network()
        optimizer = keras.mixed_precision.LossScaleOptimizer(keras.optimizers.Adam(0.01))
        model.compile(hvd.DistributedOptimizer(optimizer, **wrapping), "mse", metrics=["mae"], **compiling)
        samples = make() if make else data()[0]
        together = hvd.callbacks.distributed(callbacks)
        history = model.fit(samples, epochs=3, verbose=0, callbacks=together, **fitting)
        return [each.numpy() for each in (*model.weights, *model.optimizer.variables)], history.history

    for stop in (5, 8):
        with pytest.raises(StoppedError):
            run([StopAt(stop), hvd.callbacks.Checkpoint(folder, every_steps=3)])
    assert_the_same(run([hvd.callbacks.Checkpoint(folder)]), run([]))


@pytest.mark.slow
def test_by_epochs_and_only_so_many_stay(folder):
    with pytest.raises(StoppedError):
        training(folder, [StopAt(20)])
    assert_the_same(training(folder, keep=2), whole())
    if hvd.rank() == 0:
        assert sorted(each.name for each in folder.glob("step-*")) == ["step-000000024", "step-000000036"]
        assert (folder / "latest").read_text().strip() == "step-000000036"
        assert not [*folder.glob(".partial*"), *folder.glob(".removed*")]


@pytest.mark.slow
def test_early_stopping_stays_stopped_and_longer_training_goes_on(folder, capfd):
    stops = [keras.callbacks.EarlyStopping("loss", patience=0, mode="max")]
    first = training(folder, stops)
    assert len(first[2]) == 2
    assert_the_same(training(folder, stops), first)
    assert "ended early" in capfd.readouterr().err or hvd.rank()
    other = folder.with_name("other")
    training(other, epochs=1)
    # In a new process the script may count to more epochs; here a second fit in the same one would be refused.
    assert len(training(other, epochs=3)[2]) == 3


@pytest.mark.slow
def test_the_file_is_keras_own(folder):
    state, *_ = training(folder, epochs=1)
    if hvd.rank() == 0:
        (entry,) = folder.glob("step-*")
        model = network()
        model.compile("adam", "mse")
        model.load_weights(entry / "model.weights.h5")
        for mine, theirs in zip(model.weights, state, strict=False):
            np.testing.assert_array_equal(mine.numpy(), theirs)
        place = json.loads((entry / "state.json").read_text())["place"]
        assert (place["epoch"], place["total"], place["finished"]) == (1, 12, True)


def test_another_model_is_refused_on_every_rank(folder):
    training(folder, epochs=1)
    with pytest.raises(ValueError, match=r"momentum.*another model|another model.*where it has") as caught:
        training(folder, epochs=2, optimizer=keras.optimizers.SGD(0.1, 0.9))
    assert "its own directory" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["cut short", "one bit", "missing", "no manifest"])
def test_a_damaged_one_makes_way_for_the_one_before(folder, harm, capfd):
    with pytest.raises(StoppedError):
        training(folder, [StopAt(8)], every_steps=3)
    if hvd.rank() == 0:
        damage(folder / "step-000000006", harm)
    assert_the_same(training(folder, every_steps=100), whole())
    said = capfd.readouterr().err
    if hvd.rank() == 0:
        assert "step-000000006 is damaged" in said and "step-000000003 is used instead" in said


def damage(entry, harm):
    file = entry / "model.weights.h5"
    content = bytearray(file.read_bytes())
    if harm == "cut short":
        file.write_bytes(content[:-1])
    elif harm == "one bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "missing":
        file.unlink()
    else:
        (entry / "manifest.json").unlink()


@pytest.mark.slow
def test_where_all_are_damaged_it_begins_anew_and_says_so(folder, capfd):
    with pytest.raises(StoppedError):
        training(folder, [StopAt(8)], every_steps=6)
    if hvd.rank() == 0:
        damage(folder / "step-000000006", "one bit")
    assert_the_same(training(folder, epochs=1), whole(1))
    assert hvd.rank() or "training starts from the beginning" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "at"), [(signal.SIGUSR1, 7), (signal.SIGTERM, 11)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(folder, number, at):
    class Signal(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == at and hvd.rank() == hvd.size() - 1:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Preempted) as caught:
        training(folder, [Signal()])
    assert caught.value.code == stop_request.RESUMABLE
    assert signal.getsignal(number) == before
    sentences = hvd.allgather_object(caught.value.sentence)
    assert len(set(sentences)) == 1
    assert f"{number.name} asked it to" in sentences[0] and "goes on from there" in sentences[0]
    stop_request._asked.clear()
    assert_the_same(training(folder), whole())


@pytest.mark.slow
def test_its_time_is_up(folder, monkeypatch):
    monkeypatch.setenv("HVDTRAIN_DEADLINE", "1")
    with pytest.raises(Preempted, match="time ends in 0 s"):
        training(folder)
    monkeypatch.delenv("HVDTRAIN_DEADLINE")
    assert_the_same(training(folder), whole())
    monkeypatch.setenv("HVDTRAIN_DEADLINE", "tomorrow")
    with pytest.raises(ValueError, match="'tomorrow'"):
        training(folder.with_name("other"))


@pytest.mark.slow
def test_signals_at_random_moments_change_nothing(folder):
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(7), keras.layers.BatchNormalization()])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), "mse", metrics=["mae"])

    model.optimizer.build(model.trainable_variables)
    variables = [*model.weights, *model.optimizer.variables]
    initial = [each.numpy() for each in variables]

    def one_run(folder, number, delay):
        """As a new process would, but with functions that are traced already."""
        for each, value in zip(variables, initial, strict=True):
            each.assign(value)
        alarm = threading.Timer(delay, os.kill, (os.getpid(), number))
        checkpoint = hvd.callbacks.Checkpoint(folder, every_steps=7)
        with stop_request.hearing(signal.SIGUSR1, signal.SIGTERM):
            alarm.start()
            try:
                return model.fit(data()[0], epochs=20, verbose=0, callbacks=[checkpoint]).history
            except Preempted:
                return None
            finally:
                alarm.join()  # every run gets its signal, be it too late for it
                stop_request._asked.clear()

    def many_runs(folder, signals):
        random, history = np.random.default_rng(hvd.rank()), None
        for turn in range(signals):
            mine = turn % hvd.size() == hvd.rank()
            number = signal.SIGUSR1 if turn // hvd.size() % 2 else signal.SIGTERM
            history = one_run(folder, number if mine else 0, random.uniform(0, 0.3))
        return history or one_run(folder, 0, 0), [each.numpy() for each in model.weights]

    history, weights = many_runs(folder.with_name("undisturbed"), 0)
    again, others = many_runs(folder, 50 if os.environ.get("HVDTRAIN_TESTS") == "full" else 8)
    assert again == history
    for mine, theirs in zip(others, weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
def test_two_trainings_with_one_directory(folder):
    class Second(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            training(folder)

    with pytest.raises(RuntimeError, match="already in use by another"):
        training(folder, [Second()])
    training(folder, epochs=1)  # the folder was given back


def test_a_second_fit_that_would_train_nothing(folder):
    model = network()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
    data = hvd.shard((np.ones((16, 5)), np.ones((16, 1))), 8)
    checkpoint = hvd.callbacks.Checkpoint(folder)
    model.fit(data, epochs=1, verbose=0, callbacks=[checkpoint])
    with pytest.raises(ValueError, match="would train nothing"):
        model.fit(data, epochs=1, verbose=0, callbacks=[checkpoint])
    history = model.fit(data, initial_epoch=1, epochs=2, verbose=0, callbacks=[checkpoint])
    assert history.epoch == [0, 1]


def test_a_folder_that_cannot_be_written(folder):
    path = folder.with_name("file")
    if hvd.rank() == 0:
        path.write_text("")
    with pytest.raises((OSError, RuntimeError), match="cannot be written to"):
        training(path)


def test_other_steps_within_an_epoch_are_refused(folder):
    with pytest.raises(StoppedError):
        training(folder, [StopAt(5)], every_steps=2)
    model = network()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), "mse", metrics=["mae"])
    data = hvd.shard((np.ones((40, 5)), np.ones((40, 1))), 8)
    with pytest.raises(ValueError, match="epoch of 12 steps, and now an epoch has 5"):
        model.fit(data, epochs=3, verbose=0, callbacks=[hvd.callbacks.Checkpoint(folder)])


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"every_steps": 0}, ValueError, "every_steps must be at least 1. Received: every_steps=0"),
        ({"every_steps": 2.5}, TypeError, "every_steps must be an integer"),
        ({"every_minutes": -1}, ValueError, "every_minutes must be more than 0"),
        ({"every_minutes": "10"}, TypeError, "every_minutes must be a number"),
        ({"keep": 0}, ValueError, "keep must be at least 1"),
        ({"directory": b"x"}, TypeError, "directory must be a path"),
    ],
)
def test_arguments(folder, asked, error, says):
    with pytest.raises(error, match=says):
        hvd.callbacks.Checkpoint(**{"directory": folder, **asked})
    hvd.callbacks.Checkpoint("~/x", every_steps=np.int64(2), every_minutes=np.float32(0.5))


def test_beside_what_would_also_restore(folder):
    with pytest.raises(ValueError, match="Leave one of them out"):
        training(folder, [keras.callbacks.BackupAndRestore(folder.with_name("other"))])
    with pytest.raises(ValueError, match="takes one"):
        training(folder, [hvd.callbacks.Checkpoint(folder.with_name("other"))])
