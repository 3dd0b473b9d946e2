"""Files that C and C++ open without asking Python's `open`: HDF5, TFRecords, checkpoints, event files."""

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
from hvdtrain.patching import replace
from hvdtrain.wrap import files
from hvdtrain.wrap.rank_zero import on_rank_zero

_get_file = keras.utils.get_file
_ADAPTED = ("Discretization", "IntegerLookup", "Normalization", "StringLookup", "TextVectorization")
_READERS = (
    (tf.data.TFRecordDataset, "__init__"),
    (tf.data.TextLineDataset, "__init__"),
    (tf.data.FixedLengthRecordDataset, "__init__"),
    (tf.io, "read_file"),
)


def install(engine: Engine) -> None:
    """Keeps what ranks other than 0 write there apart, as `files.py` does.

    Args:
        engine: The ranks.
    """
    _name_alike(engine)
    for name in ("save", "write"):
        replace(tf.train.Checkpoint, name, lambda method: _by_rank_zero(engine, method))
    replace(tf.saved_model, "save", lambda method: _by_rank_zero(engine, method))
    for module in [each for name, each in sys.modules.items() if name.startswith("keras.") and each]:
        if getattr(module, "get_file", None) is _get_file:
            replace(module, "get_file", lambda fetch: _once_a_disk(engine, fetch))
    for name in _ADAPTED:
        replace(getattr(keras.layers, name), "adapt", lambda method: _behind_rank_zero(engine, method))
    if engine.rank == 0:
        return
    tf.summary.create_file_writer = lambda *args, **kwargs: tf.summary.create_noop_writer()
    replace(tf.io.TFRecordWriter, "__init__", lambda method: _moved(method, 1, files.private))
    replace(tf.io, "write_file", lambda method: _moved(method, 0, files.private))
    replace(h5py.File, "__init__", _of_mode)
    replace(tf.io.gfile.GFile, "__init__", _of_mode)
    for owner, name in _READERS:
        replace(owner, name, lambda method: _moved(method, int(method.__name__ == "__init__"), files.found))


def _name_alike(engine: Engine) -> None:
    """Lets `tempfile` find the same names on all ranks, so that all can read what rank 0 puts there."""
    names: Any = tempfile._RandomNameSequence()  # type: ignore[attr-defined]
    names._rng_pid, names._rng = (
        os.getpid(),
        random.Random(engine.broadcast_object(random.SystemRandom().random())),
    )
    tempfile._name_sequence = names  # type: ignore[attr-defined]


def _by_rank_zero(engine: Engine, method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets rank 0 write or download something; the others see it when it is there."""

    def by_rank_zero(*args: Any, **kwargs: Any) -> Any:
        result = on_rank_zero(engine, lambda: method(*args, **kwargs))
        follow(engine)
        return result

    return by_rank_zero


def _once_a_disk(engine: Engine, fetch: Callable[..., str]) -> Callable[..., str]:
    fetch_first = _by_rank_zero(engine, fetch)

    def get_file(*args: Any, **kwargs: Any) -> str:
        path = fetch_first(*args, **kwargs)
        # Not there: this host has a disk of its own.
        return path if os.path.exists(path) else fetch(*args, **kwargs)  # noqa: PTH110 - see files.py

    return get_file


def _behind_rank_zero(engine: Engine, method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets data be read from files only when rank 0 has written them all."""

    def read(*args: Any, **kwargs: Any) -> Any:
        follow(engine)
        return method(*args, **kwargs)

    return read


def follow(engine: Engine) -> None:
    """Waits for rank 0; what it has made by now is there for this rank too.

    Args:
        engine: The ranks.
    """
    files.see_until(engine.broadcast_object(files.moment()))


def _moved(method: Callable[..., Any], index: int, move: Callable[[Any], str]) -> Callable[..., Any]:
    """Takes the argument at an index for a path, or for a list of them."""
    name = list(inspect.signature(method).parameters)[index]

    def call(*args: Any, **kwargs: Any) -> Any:
        given = {name: args[index]} if len(args) > index else kwargs
        paths = given.get(name)
        if isinstance(paths, list | tuple) and all(isinstance(each, str | os.PathLike) for each in paths):
            paths = [move(each) for each in paths]
        elif isinstance(paths, str | os.PathLike) and "://" not in os.fspath(paths):
            paths = move(paths)
        rest = {key: value for key, value in kwargs.items() if key != name}
        if len(args) > index:
            return method(*args[:index], paths, *args[index + 1 :], **rest)
        return method(*args, **({name: paths} if name in kwargs else {}), **rest)

    return call


def _of_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    def opened(self: Any, name: Any, mode: str = "r", *args: Any, **kwargs: Any) -> None:
        if isinstance(name, str | os.PathLike) and "://" not in os.fspath(name):
            keeps = set(mode) & set("a+")
            name = files.private(name, bool(keeps)) if keeps or set(mode) & set("wx-") else files.found(name)
        method(self, name, mode, *args, **kwargs)

    return opened
