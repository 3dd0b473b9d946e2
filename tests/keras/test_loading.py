"""`load_model`: a saved model goes on where it stood, whoever saved it, and on all ranks."""

import json
import zipfile

import h5py
import keras
import numpy as np
import pytest
from twins import BATCH, alone, assert_identical, assert_same, data, dense_model, fit, mine

import hvdtrain.keras as hvd
from hvdtrain.keras.checkpointing.load_model import load_model
from hvdtrain.keras.optimizer.distributed import is_distributed

pytestmark = pytest.mark.ranks

FORMATS = ["keras", "h5"]
LossScale = keras.optimizers.LossScaleOptimizer
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "Adam": lambda: keras.optimizers.Adam(0.01, use_ema=True),
    "AdamW": lambda: keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.01, 20)),
    "LossScale": lambda: LossScale(keras.optimizers.Adam(0.01), initial_scale=256.0, dynamic_growth_steps=2),
}


class Own(keras.optimizers.RMSprop):
    """A user's optimizer that no registry knows."""


@keras.saving.register_keras_serializable(package="tests_loading")
class Known(keras.optimizers.RMSprop):
    """A user's optimizer that Keras' registry knows."""


def trained(optimizer, more=False):
    """Three steps on one process, which every rank computes for itself; then `more`, three further ones."""
    x, y = data(6)
    model = dense_model()
    model.compile(optimizer, "mse", metrics=["mae"], run_eagerly=True)
    for steps in (slice(3), slice(3, 6))[: 1 + more]:
        fit(model, x[steps], y[steps], BATCH * hvd.size())
    return model


def state(model):
    return [each.numpy() for each in [*model.weights, *model.optimizer.variables]]


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_goes_on_as_on_one_process(tmp_path, make, kind):
    """Saved by one plain process after three steps; three more on all ranks are those of one."""
    x, y = data(6)
    plain = trained(make())
    plain.save(tmp_path / f"plain.{kind}")
    model = load_model(str(tmp_path / f"plain.{kind}"))
    assert is_distributed(model.optimizer)
    assert_equal(state(model), state(plain))
    assert model.optimizer.get_config() == plain.optimizer.get_config()
    # Not by name: from an .h5 file Keras makes "mean_absolute_error" of "mae".
    assert model.evaluate(x[0], y[0], verbose=0) == plain.evaluate(x[0], y[0], verbose=0)
    model.run_eagerly = True
    fit(model, mine(x)[3:], mine(y)[3:], BATCH)
    assert_same(model, alone(lambda: trained(make(), more=True)), rtol=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_saved_distributed_is_distributed_once(tmp_path, kind):
    model = trained(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)))
    model.save(tmp_path / f"model.{kind}")
    loaded = load_model(tmp_path / f"model.{kind}")
    assert_equal(state(loaded), state(model))
    assert type(loaded.optimizer).__name__ == "Adam" and is_distributed(loaded.optimizer)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_loaded_model_is_saved_as_any_other(tmp_path, kind):
    trained(keras.optimizers.Adam(0.01)).save(tmp_path / f"model.{kind}")
    loaded = load_model(tmp_path / f"model.{kind}")
    loaded.optimizer.learning_rate = 0.5
    loaded.save(tmp_path / "again.keras")
    config = json.loads(zipfile.ZipFile(tmp_path / "again.keras").read("config.json"))["compile_config"]
    assert (
        config["optimizer"]["class_name"] == "Adam" and config["optimizer"]["config"]["learning_rate"] == 0.5
    )
    again = keras.saving.load_model(tmp_path / "again.keras")
    assert type(again.optimizer) is keras.optimizers.Adam
    assert_equal(state(again), state(loaded))


def test_an_open_h5_file_also_one_that_is_on_no_disk(tmp_path):
    model = trained(keras.optimizers.Adam(0.01))
    model.save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "r") as file:
        assert_equal(state(load_model(file)), state(model))
        assert file.id.valid
        with h5py.File("nowhere", "w", driver="core", backing_store=False) as memory:
            for name in file:
                file.copy(name, memory)
            memory.attrs.update(file.attrs)
            assert_equal(state(load_model(memory)), state(model))


def names_of_a_function(name, kind):
    return {name: lambda **config: hvd.DistributedOptimizer(kind(**config))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("wrap", [lambda each: each, LossScale], ids=["plain", "inside"])
@pytest.mark.parametrize(
    "options",
    [
        {"custom_optimizers": [Own]},
        {"custom_objects": {"Own": Own}},
        {"custom_objects": names_of_a_function("Own", Own)},
    ],
    ids=["custom_optimizers", "custom_objects", "function"],
)
def test_optimizers_of_a_users_own(tmp_path, options, wrap, kind):
    model = trained(wrap(Own(0.01, momentum=0.9)))
    model.save(tmp_path / f"model.{kind}")
    loaded = load_model(tmp_path / f"model.{kind}", **options)
    inner = getattr(loaded.optimizer, "inner_optimizer", loaded.optimizer)
    assert isinstance(inner, Own) and is_distributed(loaded.optimizer)
    assert_equal(state(loaded), state(model))


def test_a_registered_optimizer_needs_no_argument(tmp_path):
    trained(Known(0.01)).save(tmp_path / "model.keras")
    assert isinstance(load_model(tmp_path / "model.keras").optimizer, Known)


def test_arguments_by_position_as_in_horovod(tmp_path):
    trained(Own(0.01)).save(tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras", [Own], None, hvd.Compression.fp16, True)
    assert loaded.optimizer._hvdtrain_options.compression is hvd.Compression.fp16


def weighty_loss(truth, prediction):
    return keras.ops.mean(3 * keras.ops.square(truth - prediction), axis=-1)


def test_losses_and_layers_of_a_users_own(tmp_path):
    class Twice(keras.layers.Layer):
        def call(self, x):
            return 2 * x

    model = keras.Sequential([keras.Input((6,)), Twice(), keras.layers.Dense(3)])
    model.compile("sgd", weighty_loss)
    model.save(tmp_path / "model.keras")
    loaded = load_model(
        tmp_path / "model.keras", custom_objects={"weighty_loss": weighty_loss, "Twice": Twice}
    )
    assert loaded.loss is weighty_loss
    with pytest.raises(TypeError, match=r"Twice.*custom_objects=\{name: \.\.\.\}"):
        load_model(tmp_path / "model.keras")


def test_settings_of_compile_survive(tmp_path):
    model = dense_model()
    model.compile("adam", keras.losses.Huber(0.5), loss_weights=[2.0], metrics=["mae"], steps_per_execution=3)
    model.save(tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras")
    assert loaded.loss.get_config() == model.loss.get_config()
    assert loaded.steps_per_execution == 3 and loaded._compile_config.config["loss_weights"] == [2.0]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_model_without_an_optimizer_is_loaded_as_it_is(tmp_path, kind, capfd):
    model = dense_model()
    model.save(tmp_path / f"model.{kind}")
    loaded = load_model(tmp_path / f"model.{kind}")
    assert not loaded.compiled and ("without an optimizer" in capfd.readouterr().err) == (hvd.rank() == 0)
    assert_equal([each.numpy() for each in loaded.weights], [each.numpy() for each in model.weights])


@pytest.mark.parametrize("kind", FORMATS)
def test_loaded_on_rank_0_only_as_horovods_examples_resume(tmp_path, kind):
    """The others build the model anew; the broadcast gives them weights and momenta."""
    saved = hvd.broadcast_object(str(tmp_path / f"model.{kind}"))
    x, y = data(6)
    if hvd.rank() == 0:
        trained(keras.optimizers.SGD(0.05, momentum=0.9)).save(saved)
        model = load_model(saved)
    else:
        model = dense_model(seed=9)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9))
        model.compile(optimizer, "mse", metrics=["mae"])
    model.run_eagerly = True
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    fit(model, mine(x)[3:], mine(y)[3:], BATCH, callbacks=[broadcast])
    assert_identical(model)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    assert_same(model, alone(lambda: trained(optimizer, more=True)), rtol=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("damage", ["missing", "cut short", "garbage", "empty"])
def test_a_file_that_cannot_be_read_is_named_with_the_rank(tmp_path, kind, damage):
    path = tmp_path / f"model.{kind}"
    if damage != "missing":
        trained(keras.optimizers.Adam(0.01)).save(path)
        whole = path.read_bytes()
        path.write_bytes(
            {"cut short": whole[: len(whole) // 2], "garbage": b"nothing" * 99, "empty": b""}[damage]
        )
    with pytest.raises(ValueError, match=rf"Rank {hvd.rank()}: .*model\.{kind}.*whole"):
        load_model(path)


def test_a_damaged_part_inside_a_whole_archive(tmp_path):
    path = tmp_path / "model.keras"
    trained(keras.optimizers.Adam(0.01)).save(path)
    parts = {each: zipfile.ZipFile(path).read(each) for each in zipfile.ZipFile(path).namelist()}
    for damaged in ("config.json", "model.weights.h5"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, content[:100] if name == damaged else content)
        with pytest.raises(ValueError, match=r"model\.keras"):
            load_model(path)
