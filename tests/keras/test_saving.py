"""A model trained on many ranks is an ordinary Keras file."""

import json
import os
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from twins import BATCH, data, dense_model, fit, mine

import hvdtrain.keras as hvd

pytestmark = pytest.mark.ranks


@keras.saving.register_keras_serializable(package="tests")
class Registered(keras.optimizers.SGD):
    """A user's own optimizer."""


def trained(optimizer):
    x, y = data(3)
    model = dense_model()
    model.compile(optimizer, "mse")
    return fit(model, mine(x), mine(y), BATCH)


def config(path):
    return json.loads(zipfile.ZipFile(path).read("config.json"))["compile_config"]["optimizer"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [keras.optimizers.Adam, Registered])
def test_the_file_says_what_a_plain_optimizer_would(tmp_path, kind):
    trained(hvd.DistributedOptimizer(kind(0.01, name="mine"))).save(tmp_path / "distributed.keras")
    trained(kind(0.01, name="mine")).save(tmp_path / "plain.keras")
    assert config(tmp_path / "distributed.keras") == config(tmp_path / "plain.keras")


@pytest.mark.slow
def test_weights_and_optimizer_state_load_without_hvdtrain(tmp_path):
    model = trained(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)))
    model.save(tmp_path / "model.keras")
    loader = tmp_path / "load.py"
    loader.write_text(
        "import sys, keras, numpy\n"
        "model = keras.saving.load_model(sys.argv[1])\n"
        "assert 'hvdtrain' not in sys.modules\n"
        "assert type(model.optimizer) is keras.optimizers.Adam\n"
        "numpy.savez(sys.argv[2], *[each.numpy() for each in [*model.weights, *model.optimizer.variables]])\n"
    )
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("OMPI", "PMI", "HVDTRAIN", "PYTHONPATH"))
    }
    subprocess.run(
        [sys.executable, str(loader), str(tmp_path / "model.keras"), str(tmp_path / "seen.npz")],
        env=clean,
        check=True,
    )
    seen = np.load(tmp_path / "seen.npz").values()
    for ours, theirs in zip([*model.weights, *model.optimizer.variables], seen, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


def test_a_loaded_model_goes_on_where_it_stopped(tmp_path):
    x, y = data(6)
    whole = trained(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)))
    whole.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    again.compile(hvd.DistributedOptimizer(again.optimizer), "mse")
    for model in (whole, again):
        fit(model, mine(x)[3:], mine(y)[3:], BATCH)
    for ours, theirs in zip(whole.weights, again.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_the_class_makes_distributed_copies_of_itself():
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01))
    copy = type(optimizer).from_config(optimizer.get_config())
    assert type(copy) is type(optimizer) and copy.get_config() == optimizer.get_config()
