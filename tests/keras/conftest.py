"""Tests of the Keras layer run in the world that launched them."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def world():
    import hvdtrain.keras as hvd

    hvd.init()
    return hvd


@pytest.fixture(autouse=True)
def fresh_names():
    """Each test's layers are named from the beginning, on every rank alike."""
    import keras

    keras.utils.clear_session()
