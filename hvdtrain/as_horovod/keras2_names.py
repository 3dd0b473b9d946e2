"""Restore names of Keras 2: modules, functions and classes that Keras 3 has moved or renamed."""

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

import keras
import tensorflow as tf

_TF_KERAS = "keras._tf_keras.keras"

# Modules in both `keras` and `tf.keras`, which were one package in Keras 2. Each gets the names that only the other
# has.
_PAIRED_MODULES = (
    "backend",
    "layers",
    "losses",
    "metrics",
    "preprocessing",
    "preprocessing.image",
    "preprocessing.sequence",
)

# Modules of Keras 2 whose names are all in a module of Keras 3.
_MODULES = {
    "backend.tensorflow_backend": "backend",
    "layers.advanced_activations": "layers",
    "layers.convolutional": "layers",
    "layers.core": "layers",
    "layers.embeddings": "layers",
    "layers.merge": "layers",
    "layers.noise": "layers",
    "layers.normalization": "layers",
    "layers.pooling": "layers",
    "layers.recurrent": "layers",
    "layers.wrappers": "layers",
    "optimizers.experimental": "optimizers",
    "utils.data_utils": "utils",
    "utils.generic_utils": "utils",
    "utils.np_utils": "utils",
    "utils.vis_utils": "utils",
}

_OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "Adamax", "Ftrl", "Nadam", "Optimizer", "RMSprop", "SGD")
_LOWER_CASE = ("adadelta", "adagrad", "adam", "adamax", "nadam", "rmsprop", "sgd")


def install(keras: Any) -> None:
    """Put the names into `keras` and `tf.keras`, and make `tensorflow.keras.*` the modules behind `tf.keras.*`."""
    tf_keras = importlib.import_module(_TF_KERAS)
    keras.preprocessing.text = sys.modules["keras.preprocessing.text"] = tf_keras.preprocessing.text
    for name in _PAIRED_MODULES:
        of_keras = importlib.import_module(f"keras.{name}")
        of_tf_keras = importlib.import_module(f"{_TF_KERAS}.{name}")
        both = {**_public(of_tf_keras), **_public(of_keras)}
        if name == "backend":
            both = {name: _unwrapping(function) for name, function in both.items()}
        vars(of_keras).update(both)
        vars(of_tf_keras).update(both)
    keras.Variable.ref = lambda variable: _Reference(variable)
    for api in (keras, tf_keras):
        _add_optimizers(api)
        for old, new in _MODULES.items():
            parent, _, child = old.rpartition(".")
            module = _inside(api, new)
            sys.modules[f"{api.__name__}.{old}"] = module
            vars(_inside(api, parent)).setdefault(child, module)
    # Otherwise an import of tensorflow.keras.losses would load the same file again, without the added names.
    for name in list(sys.modules):
        if name.startswith(_TF_KERAS):
            sys.modules[name.replace(_TF_KERAS, "tensorflow.keras", 1)] = sys.modules[name]


def _add_optimizers(api: Any) -> None:
    classes = {name: getattr(keras.optimizers, name) for name in _OPTIMIZERS}
    vars(importlib.import_module(f"{api.__name__}.optimizers.legacy")).update(classes)
    lower = {name.lower(): kind for name, kind in classes.items() if name.lower() in _LOWER_CASE}
    vars(api.optimizers).update(lower)


def _unwrapping(function: Any) -> Any:
    """Let a function of `keras.backend`, written for TensorFlow variables, accept those of Keras 3."""
    if isinstance(function, type | ModuleType) or not callable(function):
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tf.nest.map_structure(_tensorflow_variable, (args, kwargs))
        return function(*args, **kwargs)

    return call


def _tensorflow_variable(value: Any) -> Any:
    return value.value if isinstance(value, keras.Variable) else value


class _Reference:
    """The result of `variable.ref()`: a hashable reference, because a variable itself is not hashable."""

    def __init__(self, variable: Any) -> None:
        self._variable = variable

    def deref(self) -> Any:
        """Return the variable."""
        return self._variable

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reference) and self._variable is other._variable

    def __hash__(self) -> int:
        return id(self._variable)


def _inside(module: Any, path: str) -> Any:
    return importlib.import_module(f"{module.__name__}.{path}")


def _public(module: ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}
