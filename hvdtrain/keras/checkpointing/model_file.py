"""Save and load a model's weights in the file format of Keras, in memory."""

import io
from pathlib import Path

import h5py
import keras
import numpy as np
from keras.src.saving import saving_lib

from hvdtrain.checkpoints import plain

NAME = "model.weights.h5"


def weights_file(model: keras.Model) -> bytes:
    """Return the file content of `model.save_weights`: weights and the optimizer's state."""
    buffer = io.BytesIO()
    store = saving_lib.H5IOStore(buffer, mode="w")
    saving_lib._save_state(model, store, None, inner_path="", visited_saveables=set())
    store.h5_file.close()  # store.close() would close the buffer too
    return buffer.getvalue()


def load(model: keras.Model, path: Path) -> None:
    """Load weights as `model.load_weights` does, also for a model that is not built but whose layers are."""
    store = saving_lib.H5IOStore(str(path), mode="r")
    try:
        saving_lib._load_state(model, store, None, inner_path="", visited_saveables=set())
    finally:
        store.close()


def digests_in(content: bytes) -> set[bytes]:
    """Return the digests of all arrays in the content of a weights file."""
    found: set[bytes] = set()

    def take(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "biufc":
            found.add(plain.digest(np.asarray(item[()])))

    with h5py.File(io.BytesIO(content), "r") as file:
        file.visititems(take)
    return found
