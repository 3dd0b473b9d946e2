"""A model's weights in Keras' own format, in memory, where no disk can be full."""

import io
from pathlib import Path

import h5py
import keras
import numpy as np
from keras.src.saving import saving_lib

from hvdtrain.checkpoints import plain

NAME = "model.weights.h5"


def weights_file(model: keras.Model) -> bytes:
    """Return the bytes that `model.save_weights` writes: weights and the optimizer's state."""
    buffer = io.BytesIO()
    store = saving_lib.H5IOStore(buffer, mode="w")
    saving_lib._save_state(model, store, None, inner_path="", visited_saveables=set())
    store.h5_file.close()  # the store's own close would close the buffer too
    return buffer.getvalue()


def load(model: keras.Model, path: Path) -> None:
    """Do what `model.load_weights` does, also for a model of which only the parts are ever called."""
    store = saving_lib.H5IOStore(str(path), mode="r")
    try:
        saving_lib._load_state(model, store, None, inner_path="", visited_saveables=set())
    finally:
        store.close()


def digests_in(content: bytes) -> set[bytes]:
    """Return the digests of all arrays in such a file."""
    found: set[bytes] = set()

    def take(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "biufc":
            found.add(plain.digest(np.asarray(item[()])))

    with h5py.File(io.BytesIO(content), "r") as file:
        file.visititems(take)
    return found
