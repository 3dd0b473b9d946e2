"""Tests of the Keras layer run in the world that launched them."""

import pathlib
import shutil
import tempfile

import pytest


@pytest.fixture(scope="session", autouse=True)
def world():
    import gc

    import hvdtrain.keras as hvd

    hvd.init()
    gc.freeze()  # TensorFlow itself need not be looked through, over and over, for what can be freed
    return hvd


@pytest.fixture(autouse=True)
def fresh_names(monkeypatch):
    """Layers and reductions are named from the beginning on every rank alike, whatever failed before."""
    import itertools

    import keras

    from hvdtrain.gradients import reducer

    keras.utils.clear_session(free_memory=False)  # which would take most of a second each time
    monkeypatch.setattr(reducer, "_numbers", itertools.count())


@pytest.fixture
def folder():
    """A folder that all ranks know."""
    import hvdtrain.keras as hvd

    path = hvd.broadcast_object(tempfile.mkdtemp() if hvd.rank() == 0 else None, 0)
    yield pathlib.Path(path) / "checkpoints"
    if hvd.rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
