"""hvd.callbacks.distributed: Keras' own callbacks decide alike on all ranks, and write on one."""

import importlib.util
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import assert_identical

import hvdtrain.keras as hvd

pytestmark = pytest.mark.ranks

ROWS, BATCH = 24, 8
distributed = hvd.callbacks.distributed


@pytest.fixture
def several(world):
    if world.size() == 1:
        pytest.skip("a world of one has nobody to tell")


@pytest.fixture
def samples():
    random = np.random.default_rng(3)
    x, y = (
        random.standard_normal((ROWS, 5)).astype("float32"),
        random.standard_normal((ROWS, 1)).astype("float32"),
    )
    return x, y


@pytest.fixture
def validation():
    random = np.random.default_rng(4)
    return random.standard_normal((22, 5)).astype("float32"), random.standard_normal((22, 1)).astype(
        "float32"
    )


def compiled(*layers, rate=0.1, plain=False, seed=5):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((5,)), *layers, keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(rate)
    model.compile(
        optimizer if plain else hvd.DistributedOptimizer(optimizer), "mse", metrics=["mae"], run_eagerly=True
    )
    return model


def fit(model, samples, callbacks, epochs=1, **options):
    data = hvd.shard(samples, batch_size=BATCH, shuffle=False)
    options = {"verbose": 0} | options
    return model.fit(data, epochs=epochs, callbacks=distributed(callbacks), **options).history


def alike(value):
    everyone = hvd.allgather_object(value)
    for each in everyone:
        np.testing.assert_equal(each, everyone[0])
    return value


class Board(keras.callbacks.TensorBoard):
    """Stands in where TensorBoard is not installed."""

    def set_model(self, model):
        Path(self.log_dir).mkdir()

    def _nothing(self, *args, **kwargs):
        """Keras' own would write summaries."""

    on_train_begin = on_train_end = on_epoch_begin = on_epoch_end = on_test_begin = on_test_end = _nothing
    on_train_batch_begin = on_train_batch_end = _nothing


def board(folder):
    kind = keras.callbacks.TensorBoard if importlib.util.find_spec("tensorboard") else Board
    return kind(folder)


def stock(folder):
    """Callbacks that decide by a validation that goes up and down, as it does at a high learning rate."""
    return [
        keras.callbacks.EarlyStopping("val_loss", 0.01, patience=2, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.01),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.99),
        keras.callbacks.ModelCheckpoint(folder / "best.keras", save_best_only=True),
        keras.callbacks.CSVLogger(folder / "log.csv"),
        board(folder / "board"),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: alike(dict(logs))),
    ]


@pytest.mark.slow
def test_a_training_with_many_callbacks_is_that_of_one_process(samples, validation, tmp_path):
    ours, plain = compiled(rate=0.3), compiled(rate=0.3, plain=True)
    callbacks = stock(tmp_path)
    history = fit(ours, samples, callbacks, 20, validation_data=validation, validation_batch_size=4)
    theirs = stock(tmp_path / "single")[:3]
    expected = plain.fit(
        *samples, BATCH, 20, verbose=0, callbacks=theirs, shuffle=False, validation_data=validation
    ).history
    assert len(expected["loss"]) < 20 and callbacks[0].stopped_epoch == theirs[0].stopped_epoch
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-4, err_msg=name)
    for mine, other in zip(ours.weights, plain.weights, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)
    assert_identical(ours)
    alike(float(ours.optimizer.learning_rate))


def test_files_are_written_by_rank_0_only_and_hold_its_best(samples, validation, tmp_path):
    """Each rank names a folder of its own, so that nobody could write into rank 0's by mistake."""
    ours = compiled(rate=0.3)
    history = fit(ours, samples, stock(tmp_path), 20, validation_data=validation)
    names = {each.name for each in tmp_path.iterdir()}
    assert names == ({"best.keras", "log.csv", "board"} if hvd.rank() == 0 else set())
    if hvd.rank() == 0:
        loss = keras.saving.load_model(tmp_path / "best.keras").evaluate(*validation, verbose=0)[0]
        np.testing.assert_allclose(loss, min(history["val_loss"]), rtol=1e-5)
        assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + len(history["loss"])


class Tests(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.batches = []

    def on_test_begin(self, logs=None):
        self.batches.append(0)

    def on_test_batch_end(self, batch, logs=None):
        self.batches[-1] += 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["arrays", "own parts", "dataset", "sharded", "few", "steps"])
def test_validation_is_divided_and_exact(samples, validation, kind):
    x, y = validation
    parts = np.array_split(np.arange(22), hvd.size())
    data, steps, batches = {
        "arrays": (validation, None, 6),
        "own parts": ((x[parts[hvd.rank()]], y[parts[hvd.rank()]]), None, None),
        "dataset": (tf.data.Dataset.from_tensor_slices(validation).batch(4), None, None),
        "sharded": (hvd.shard(validation, batch_size=4 * hvd.size(), shuffle=False), None, None),
        "few": ((x[:1], y[:1]), None, hvd.size()),
        "steps": (validation, 2, 2),
    }[kind]
    model, tests = compiled(rate=0.0), Tests()
    options = {"validation_data": data, "validation_batch_size": 4, "validation_steps": steps}
    history = fit(model, samples, [tests], 2, **options)
    rows = 1 if kind == "few" else 8 if kind == "steps" else 22
    if kind == "steps" and hvd.size() > 2:  # fewer batches than ranks: smaller ones
        batches = None
    expected = compiled(rate=0.0).evaluate(x[:rows], y[:rows], verbose=0, return_dict=True)
    for name, value in expected.items():
        np.testing.assert_allclose(history[f"val_{name}"], [value] * 2, rtol=1e-5)
    if batches is not None:
        assert np.sum(hvd.allgather_object(tests.batches), 0).tolist() == [batches] * 2
    assert "evaluate" not in vars(model)


class StopsAt(keras.callbacks.Callback):
    """Stops one rank at a batch or at the end of an epoch."""

    def __init__(self, rank, batch=None):
        super().__init__()
        self.rank, self.batch = rank, batch
        if batch is not None:
            self.on_train_batch_end = self.at_batch

    def at_batch(self, batch, logs=None):
        self.model.stop_training |= hvd.rank() == self.rank and batch == self.batch

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training |= hvd.rank() == self.rank


@pytest.mark.parametrize("batch", [None, 0, 1])
def test_who_stops_one_stops_all_at_the_same_step(samples, batch):
    model = compiled()
    history = fit(model, samples, [StopsAt(hvd.size() - 1, batch)], 5)
    assert len(history["loss"]) == 1
    assert alike(int(model.optimizer.iterations)) == (3 if batch is None else batch + 1)
    assert_identical(model)


def test_a_nan_on_one_rank_ends_all_and_names_the_rank(samples, capfd):
    x, y = (np.array(each) for each in samples)
    x[2 * BATCH - 1] = np.nan  # in the second batch, of which the last rank has the last row
    model = compiled()
    history = fit(model, (x, y), [keras.callbacks.TerminateOnNaN()], 5)
    assert alike(int(model.optimizer.iterations)) == 2 and np.isnan(alike(history["loss"])).all()
    said = capfd.readouterr().err
    told = "loss, mae not finite (NaN or infinite) in the training of epoch 1, from batch 2 on, first on rank"
    assert said.count(f"{told} {hvd.size() - 1}.") == (hvd.rank() == 0 and hvd.size() > 1)


def test_a_nan_in_one_ranks_validation_is_named(samples, validation, capfd):
    x, y = (each.copy() for each in validation)
    y[-1] = np.nan
    history = fit(compiled(), samples, [], 2, validation_data=(x, y), validation_batch_size=2)
    assert np.isnan(history["val_loss"]).all() and np.isfinite(history["loss"]).all()
    told = re.findall(
        r"in the validation of epoch 1, from batch \d+ on, first on rank (\d)", capfd.readouterr().err
    )
    assert told == ([str(10 % hvd.size())] if hvd.rank() == 0 and hvd.size() > 1 else [])


class Breaks(keras.callbacks.Callback):
    def __init__(self, hook):
        super().__init__()
        setattr(self, hook, self.raises)

    def raises(self, *args, **kwargs):
        if hvd.rank() == 1:
            raise OSError("disk full")


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize(
    "hook", ["on_train_begin", "on_train_batch_end", "on_test_batch_end", "on_epoch_end", "on_train_end"]
)
def test_a_callback_that_raises_on_one_rank_ends_all(samples, validation, hook):
    error = OSError if hvd.rank() == 1 else hvd.MismatchError
    with pytest.raises(
        error, match="disk full" if hvd.rank() == 1 else f"(?s)Breaks.{hook} raised OSError: disk full"
    ):
        fit(compiled(), samples, [Breaks(hook)], 2, validation_data=validation)
        hvd.barrier()


class Interrupted(Exception):
    pass


class Interrupts(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise Interrupted


def test_backup_and_restore_goes_on_where_all_were(samples, tmp_path):
    def with_momentum(seed):
        model = compiled(seed=seed)
        optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
        model.compile(hvd.DistributedOptimizer(optimizer), "mse", run_eagerly=True)
        return model

    whole = with_momentum(5)
    expected = fit(whole, samples, [], 4)["loss"]
    with pytest.raises(Interrupted):
        fit(with_momentum(5), samples, [keras.callbacks.BackupAndRestore(tmp_path), Interrupts()], 4)
    assert any(tmp_path.iterdir()) == (hvd.rank() == 0)
    again = with_momentum(hvd.rank())  # what a new start would begin from
    losses = fit(again, samples, keras.callbacks.BackupAndRestore(tmp_path), 4)["loss"]
    np.testing.assert_allclose(alike(losses), expected[2:], rtol=1e-5)
    for mine, other in zip(again.weights, whole.weights, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5)
    assert_identical(again)


@pytest.mark.parametrize("verbose", [1, 2])
def test_rank_0_prints_and_its_epoch_line_is_exact(samples, validation, capsys, verbose):
    given = [keras.callbacks.ProgbarLogger()] if verbose == 1 else []
    given.append(keras.callbacks.EarlyStopping("val_loss", patience=0, min_delta=9, verbose=1))
    history = fit(compiled(), samples, given, 3, verbose=verbose, validation_data=validation)
    printed = capsys.readouterr().out
    if hvd.rank():
        assert printed == ""
        return
    assert "Epoch 2: early stopping" in printed
    last = printed.replace("\b", "").replace("\r", "\n").split("Epoch 2/3")[0].strip().splitlines()[-1]
    for name in ("loss", "mae", "val_loss", "val_mae"):
        assert f" {name}: {history[name][0]:.4f}" in last


def test_batch_normalization_is_common_when_it_is_looked_at(samples, validation, tmp_path):
    class Sees(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            self.validated = [each.numpy() for each in self.model.weights]

    class Own(keras.callbacks.Callback):
        """Comes before the averaging, since it is a metric's update that it takes note of."""

        def on_train_batch_end(self, batch, logs=None):
            self.mean, self.variance = (self.model.layers[0].weights[i].numpy() for i in (2, 3))

    sees, own = Sees(), Own()
    model = compiled(keras.layers.BatchNormalization(), rate=0.0)
    path = tmp_path / "m.weights.h5"
    save = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    fit(model, samples, [own, sees, save], validation_data=validation)
    means, variances = zip(*hvd.allgather_object((own.mean, own.variance)), strict=True)
    mean = np.mean(means, 0)
    variance = np.mean(variances + np.square(means), 0) - mean**2
    np.testing.assert_allclose(sees.validated[2], mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sees.validated[3], variance, rtol=1e-4)
    np.testing.assert_array_equal(model.weights[2], sees.validated[2])
    assert_identical(model)
    if hvd.rank() == 0:
        model.load_weights(path)
        np.testing.assert_array_equal(model.weights[3], sees.validated[3])


@pytest.mark.parametrize("length", [1, 5, 8])
def test_batch_normalization_counts_each_sample_once(samples, length):
    """Of a batch of 1 or 5 the ranks hold different numbers of samples, some of them none."""
    model = compiled(keras.layers.BatchNormalization(momentum=0.5), rate=0.0)
    model.run_eagerly = False
    samples = tuple(part[:length] for part in samples)
    own = hvd.shard(samples, batch_size=BATCH, shuffle=False)
    model.fit(own, verbose=0, callbacks=distributed([], average_batch_norm=False))
    moved = [not np.array_equal(mean, np.zeros(5)) for mean in hvd.allgather_object(model.weights[2].numpy())]
    assert moved == [rank < length for rank in range(hvd.size())]
    fresh = compiled(keras.layers.BatchNormalization(momentum=0.5), rate=0.0)
    fit(fresh, samples, [])
    np.testing.assert_allclose(fresh.weights[2], 0.5 * samples[0].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [17, 21, 24])
def test_synchronized_batch_normalization_is_that_of_one_process(samples, length):
    samples = tuple(part[:length] for part in samples)
    model = compiled(hvd.SyncBatchNormalization(momentum=0.5))
    model.run_eagerly = False
    fit(model, samples, [], epochs=2)
    plain = compiled(keras.layers.BatchNormalization(momentum=0.5), plain=True)
    plain.fit(*samples, batch_size=BATCH, shuffle=False, epochs=2, verbose=0)
    for ours, theirs in zip(model.weights, plain.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_statistics_that_are_not_to_be_averaged(samples):
    model = compiled(keras.layers.BatchNormalization(), rate=0.0)
    data = hvd.shard(samples, batch_size=BATCH, shuffle=False)
    model.fit(data, verbose=0, callbacks=distributed([], average_batch_norm=False))
    assert len({each.tobytes() for each in hvd.allgather_object(model.weights[2].numpy())}) == hvd.size()


class Draws(keras.layers.Dropout):
    """Notes what was dropped."""

    def call(self, inputs, training=False):
        outputs = super().call(tf.ones_like(inputs), training)
        if training:
            self.seen = [*getattr(self, "seen", []), outputs.numpy() == 0]
        return inputs


def test_dropout_differs_between_ranks_and_repeats_from_the_seed(samples):
    def dropped():
        layer = Draws(0.5)
        x = np.ones((4 * hvd.size(), 5), "float32")
        fit(compiled(layer, keras.layers.Dense(16)), (x, x[:, :1]), [], 3)
        return np.concatenate(layer.seen).tobytes()

    first, second = dropped(), dropped()
    assert first == second
    assert len(set(hvd.allgather_object(first))) == hvd.size()


def test_random_numbers_that_a_script_draws_later_do_not_depend_on_the_ranks(samples):
    import random

    random.seed(7)
    keras.src.backend.common.global_state.set_global_attribute("global_seed_generator", None)
    model = compiled(seed=7)
    fit(model, samples, [])
    after = random.random()
    random.seed(7)
    keras.utils.set_random_seed(7)
    compiled(seed=7)
    keras.random.SeedGenerator()  # the one that Keras itself makes at its first draw
    assert after == random.random()


@pytest.mark.parametrize("wrap", [lambda each: each, lambda each: [each], lambda each: distributed([[each]])])
def test_ways_to_give_callbacks(samples, wrap):
    tests = Tests()
    fit(compiled(), samples, wrap(tests), validation_data=samples)
    assert len(tests.batches) == 1
    fit(compiled(), samples, None)


def test_what_is_no_callback_is_refused():
    with pytest.raises(TypeError, match=r"keras.callbacks.Callback.*Received: 'EarlyStopping'"):
        hvd.callbacks.distributed(["EarlyStopping"])


def test_an_evaluation_of_all_ranks_inside_a_callback(samples, validation):
    class Evaluates(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.results = hvd.evaluate(self.model, validation, verbose=0, return_dict=True)

    own = Evaluates()
    history = fit(compiled(), samples, [own], validation_data=validation)
    np.testing.assert_allclose(own.results["loss"], history["val_loss"][-1], rtol=1e-5)


def test_a_callback_for_rank_0_only(samples, tmp_path):
    class Writes(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            Path(tmp_path / f"{epoch}").touch()

    fit(compiled(), samples, [hvd.callbacks.RankZeroCallback(Writes())], 2)
    assert len(list(tmp_path.iterdir())) == (2 if hvd.rank() == 0 else 0)
