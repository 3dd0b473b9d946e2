"""Load a saved model so that it can continue training on all ranks."""

import json
import types
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
from keras.src.legacy import layers as legacy_layers
from keras.src.legacy.saving import legacy_h5_format, saving_utils

from hvdtrain import runtime
from hvdtrain.backends.tensorflow.compression import Compression
from hvdtrain.keras.optimizer.distributed import DistributedOptimizer, is_distributed

# Errors of Keras, zipfile and h5py for a file that is missing, truncated or of another format.
_UNREADABLE = (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
_CLASSES = "Classes and functions of your own go into custom_optimizers=[...] and custom_objects={name: ...}."
# Losses that Keras abbreviates in an .h5 file but does not recognise when it reads the file.
_ABBREVIATIONS = ("bce", "kld", "mae", "mape", "mse", "msle")


def load_model(
    filepath: Any,
    custom_optimizers: Iterable[type] | None = None,
    custom_objects: dict[str, Any] | None = None,
    compression: Any = Compression.none,
    legacy_opts: bool = False,
) -> Any:
    """Load a model that continues training on all ranks exactly where the saved model stopped.

    Weights, loss, metrics and the optimizer with its state (momenta, number of steps, loss scale) are those of
    the file; the optimizer is made distributed. The file may have been saved on any number of processes, with
    hvdtrain or without. This does not communicate, so it may be called on all ranks or, with a later
    `BroadcastGlobalVariablesCallback(0)`, on rank 0 only.

    The API is Horovod's (https://horovod.readthedocs.io/en/stable/keras.html).

    Args:
        filepath: Path of a `.keras` or `.h5` file, or an open `h5py.File`.
        custom_optimizers: Classes of optimizers of your own that the model may have been saved with.
        custom_objects: Names, and your own classes or functions with these names. An optimizer's class may be
            replaced by a function that makes a (distributed) optimizer from its configuration.
        compression: See `hvd.DistributedOptimizer`.
        legacy_opts: Accepted for compatibility with Horovod; Keras 3 has no legacy optimizers.

    Returns:
        The model, compiled. A model that was saved without an optimizer is returned unmodified, with a message.

    Raises:
        ImportError: If it is an `.h5` file and h5py is not installed.
        ValueError: If the file is missing, damaged or of another format, or `hvd.init()` was not called.
        TypeError: If it contains objects of unknown classes.
    """
    engine = runtime.engine()
    custom = {cls.__name__: cls for cls in custom_optimizers or ()} | (custom_objects or {})
    # Layers that tf.keras still offers and writes into files, but that Keras itself does not read.
    objects = {cls.__name__: cls for cls in vars(legacy_layers).values() if isinstance(cls, type)} | custom
    try:
        model = _loaded(filepath, objects)
    except (TypeError, *_UNREADABLE) as error:
        reason = str(error).rstrip(".")
        failed = f"Rank {engine.rank}: hvd.load_model cannot load {filepath}: {reason}."
        if isinstance(error, TypeError):
            raise TypeError(f"{failed} {_CLASSES}") from error
        raise ValueError(
            f"{failed} Does the file exist on this rank's machine, and is it whole? {_CLASSES}"
        ) from error
    if getattr(model, "optimizer", None) is None:
        engine.say(
            f"{filepath} was saved without an optimizer. The model is loaded as it is; compile it with "
            "hvd.DistributedOptimizer(...) before model.fit."
        )
    _make_distributed(model, compression)
    return model


def _loaded(filepath: Any, objects: dict[str, Any]) -> Any:
    if hasattr(filepath, "attrs"):
        return _loaded_from_h5(filepath, objects)
    if str(filepath).endswith((".h5", ".hdf5")):
        import h5py

        with h5py.File(filepath, "r") as file:
            return _loaded_from_h5(file, objects)
    if not zipfile.is_zipfile(filepath):  # another format, which Keras reads or rejects
        return keras.saving.load_model(filepath, custom_objects=objects)
    with zipfile.ZipFile(filepath) as archive:
        compiled = json.loads(archive.read("config.json")).get("compile_config") or {}
    makers = _with_makers(objects, compiled.get("optimizer"))
    return keras.saving.load_model(filepath, custom_objects=makers)


def _loaded_from_h5(file: Any, objects: dict[str, Any]) -> Any:
    """Load a model from HDF5 with the optimizer's state, which Keras 3.5 to 3.15 do not restore."""
    config = json.loads(file.attrs.get("training_config") or "null")
    if config is None:
        return legacy_h5_format.load_model_from_hdf5(file, custom_objects=objects, compile=False)
    names = keras.tree.flatten(config["loss"])
    abbreviated = {name: keras.losses.get(name) for name in _ABBREVIATIONS if name in names}
    known = abbreviated | _with_makers(objects, config["optimizer_config"])
    model = legacy_h5_format.load_model_from_hdf5(file, custom_objects=known, compile=False)
    model.compile(**saving_utils.compile_args_from_training_config(config, known))
    if "optimizer_weights" in file:
        state = legacy_h5_format.load_optimizer_weights_from_hdf5_group(file)
        if len(state) > len(model.optimizer.variables):
            model.optimizer.build(model.trainable_variables)
        for variable, value in zip(model.optimizer.variables, state, strict=True):
            variable.assign(value)
    return model


def _make_distributed(model: Any, compression: Any) -> None:
    plain = {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, keras.optimizers.Optimizer) and not is_distributed(value)
    }
    for name, optimizer in plain.items():
        setattr(model, name, DistributedOptimizer(optimizer, compression=compression))
    if "optimizer" in plain:
        # Not the model's own `compile`: a user's class has already stored what its `compile` sets.
        keras.Model.compile(model, **{**model._compile_config.config, "optimizer": model.optimizer})


class _Maker:
    """A function in the form in which Keras expects an optimizer's class."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, **config: Any) -> Any:
        return self._function(**config)

    def from_config(self, config: dict[str, Any], custom_objects: Any = None) -> Any:
        return self._function(**config)


def _with_makers(objects: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Wrap the functions in `objects` that replace the saved optimizer's class."""
    names = set(_class_names(optimizer))
    return {
        name: _Maker(value) if name in names and isinstance(value, types.FunctionType) else value
        for name, value in objects.items()
    }


def _class_names(config: Any) -> Iterator[str]:
    """Yield the class names in a saved optimizer's configuration, including those of inner optimizers."""
    if isinstance(config, dict):
        yield from (config[key] for key in ("class_name", "registered_name") if config.get(key))
        for value in config.values():
            yield from _class_names(value)
