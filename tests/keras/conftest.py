"""Tests of the Keras layer run in the world that launched them."""

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
