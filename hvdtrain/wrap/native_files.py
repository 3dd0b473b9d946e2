"""Let rank 0 alone write models, HDF5, TFRecords, checkpoints and event files, which bypass Python's `open`."""

import inspect
import os
import random
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import h5py
import keras
import tensorflow as tf

from hvdtrain.collectives.engine import Engine
from hvdtrain.patching import replace, replace_where_defined
from hvdtrain.wrap import files
from hvdtrain.wrap.files import redirected
from hvdtrain.wrap.rank_zero import on_rank_zero

# Preprocessing layers whose `adapt` may read files.
_ADAPTED = ("Discretization", "IntegerLookup", "Normalization", "StringLookup", "TextVectorization")
_DATASETS = (tf.data.TFRecordDataset, tf.data.TextLineDataset, tf.data.FixedLengthRecordDataset)


def install(engine: Engine) -> None:
    """Redirect the files that ranks other than 0 write without Python's `open`, as `files.py` does."""
    for name in ("save", "save_weights", "export"):
        replace_where_defined(keras.Model, name, lambda method: _saved_by_rank_zero(engine, method))
    _use_same_temporary_names(engine)
    for owner, name in (
        (tf.train.Checkpoint, "save"),
        (tf.train.Checkpoint, "write"),
        (tf.saved_model, "save"),
    ):
        replace(owner, name, lambda method: _by_rank_zero(engine, method))
    get_file = keras.utils.get_file
    for name, module in list(sys.modules.items()):
        if name.startswith("keras.") and getattr(module, "get_file", None) is get_file:
            replace(module, "get_file", lambda fetch: _once_per_disk(engine, fetch))
    for name in _ADAPTED:
        replace(getattr(keras.layers, name), "adapt", lambda method: _after_rank_zero(engine, method))
    if engine.rank:
        _use_private_copies()


def _use_private_copies() -> None:
    tf.summary.create_file_writer = lambda *args, **kwargs: tf.summary.create_noop_writer()
    replace(tf.io.TFRecordWriter, "__init__", redirected(files.for_writing, "path", 1))
    replace(tf.io, "write_file", redirected(files.for_writing, "filename"))
    replace(tf.io, "read_file", redirected(files.for_reading, "filename"))
    for dataset in _DATASETS:
        replace(dataset, "__init__", redirected(files.for_reading, "filenames", 1))
    for file in (h5py.File, tf.io.gfile.GFile):
        replace(file, "__init__", redirected(files.for_mode, "name", 1))


def _saved_by_rank_zero(engine: Engine, method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    def save(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        path = given.arguments.get("filepath")
        if not isinstance(path, str | os.PathLike):
            method(*given.args, **given.kwargs)
            return
        on_rank_zero(engine, lambda: method(*given.args, **given.kwargs))
        is_shared = not engine.rank or files.share(path)
        engine.barrier()  # before this, rank 0 must not remove the file, as BackupAndRestore does at the end
        if not is_shared:
            # This host does not share the disk of rank 0: write a copy here.
            given.arguments["filepath"] = files.for_writing(path)
            method(*given.args, **given.kwargs)

    return save


def _use_same_temporary_names(engine: Engine) -> None:
    """Let `tempfile` choose the same names on all ranks, so that all ranks can read the files of rank 0."""
    names: Any = tempfile._RandomNameSequence()  # type: ignore[attr-defined]
    names._rng_pid = os.getpid()
    names._rng = random.Random(engine.broadcast_object(random.SystemRandom().random()))
    tempfile._name_sequence = names  # type: ignore[attr-defined]


def _by_rank_zero(engine: Engine, method: Callable[..., Any]) -> Callable[..., Any]:
    """Let rank 0 write or download something; other ranks see it afterwards."""

    def by_rank_zero(*args: Any, **kwargs: Any) -> Any:
        result = on_rank_zero(engine, lambda: method(*args, **kwargs))
        see_files_of_rank_zero(engine)
        return result

    return by_rank_zero


def _once_per_disk(engine: Engine, fetch: Callable[..., str]) -> Callable[..., str]:
    fetch_first = _by_rank_zero(engine, fetch)

    def get_file(*args: Any, **kwargs: Any) -> str:
        path = fetch_first(*args, **kwargs)
        # The file is missing if this host does not share the disk of rank 0.
        return path if os.path.exists(path) else fetch(*args, **kwargs)  # noqa: PTH110 - see files.py

    return get_file


def _after_rank_zero(engine: Engine, method: Callable[..., Any]) -> Callable[..., Any]:
    """Read data from files only after rank 0 has written them."""

    def read(*args: Any, **kwargs: Any) -> Any:
        see_files_of_rank_zero(engine)
        return method(*args, **kwargs)

    return read


def see_files_of_rank_zero(engine: Engine) -> None:
    """Wait for rank 0, and show this rank the files that rank 0 has made until now."""
    files.show_files_until(engine.broadcast_object(files.time_between_files()))
