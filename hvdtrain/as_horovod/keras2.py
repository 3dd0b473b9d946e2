"""Accept calls and names of Keras 2 on Keras 3, each with the reason why this is safe."""

import functools
import importlib
import inspect
import math
import operator
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras
import tensorflow as tf

from hvdtrain.as_horovod import keras2_optimizers, keras2_training
from hvdtrain.patching import definer, replace_outermost

# A function that takes the value of an argument of Keras 2 and returns the arguments of Keras 3 with that meaning.
Meaning = Callable[[Any], dict[str, Any]]


def _ignored(*names: str) -> dict[str, Meaning]:
    return {name: lambda value: {} for name in names}


def _rounded_up(name: str) -> dict[str, Meaning]:
    """Accept a fraction as a number of steps: Keras 2 counted until it was reached, so 4.5 steps were 5."""
    return {name: lambda value: {name: math.ceil(value) if isinstance(value, float) else value}}


# They chose how data was fetched, not which data.
_FETCHING = _ignored("max_queue_size", "workers", "use_multiprocessing")

_ARGUMENTS: dict[tuple[str, str], dict[str, Meaning]] = {
    # They chose how a step was traced, and allowed sample weights of several axes, as Keras 3 always does.
    ("Model", "compile"): _ignored("experimental_run_tf_function", "sample_weight_mode"),
    ("Model", "fit"): _FETCHING | _rounded_up("steps_per_epoch") | _rounded_up("validation_steps"),
    ("Model", "evaluate"): _FETCHING | _rounded_up("steps"),
    ("Model", "predict"): _FETCHING | _rounded_up("steps"),
    # It chose a kernel of TensorFlow.
    ("layers.BatchNormalization", "__init__"): _ignored("fused"),
    # TensorFlow 2 already ignored them.
    ("callbacks.TensorBoard", "__init__"): _ignored(
        "batch_size", "write_grads", "embeddings_layer_names", "embeddings_data"
    ),
    # It is the older name.
    ("callbacks.ReduceLROnPlateau", "__init__"): {"epsilon": lambda value: {"min_delta": value}},
    # They named an operation, or concerned the replicas of a tf.distribute strategy.
    ("optimizers.Optimizer", "apply_gradients"): _ignored(
        "name", "experimental_aggregate_gradients", "skip_gradients_aggregation"
    ),
    # In Keras 3 it is an argument of compile.
    ("optimizers.Optimizer", "__init__"): _ignored("jit_compile"),
}

_TF_KERAS = "keras._tf_keras.keras"

# Modules in both `keras` and `tf.keras`, which were one package in Keras 2. Each gets the names that only the other
# has.
_PAIRED_MODULES = (
    *("backend", "layers", "losses", "metrics"),
    *("preprocessing", "preprocessing.image", "preprocessing.sequence"),
)

# Modules of Keras 2 whose names are all in a module of Keras 3.
_MODULES = {
    "backend": ("tensorflow_backend",),
    "layers": (
        *("advanced_activations", "convolutional", "core", "embeddings", "merge", "noise", "normalization"),
        *("pooling", "recurrent", "wrappers"),
    ),
    "optimizers": ("experimental",),
    "utils": ("data_utils", "generic_utils", "np_utils", "vis_utils"),
}

_OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "Adamax", "Ftrl", "Nadam", "Optimizer", "RMSprop", "SGD")
_ONLY_CAPITALIZED = ("Ftrl", "Optimizer")


def install() -> None:
    """Restore the calls and names. What Keras 3 accepts keeps its meaning."""
    _add_names()
    keras2_training.install()
    keras2_optimizers.install()
    for (owner, method), meanings in _ARGUMENTS.items():
        kind = operator.attrgetter(owner)(keras)
        replace_outermost(definer(kind, method), method, _translating(meanings))


def _translating(meanings: dict[str, Meaning]) -> Callable[[Any], Any]:
    def make(method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            for name in meanings.keys() & kwargs.keys():
                kwargs.update(meanings[name](kwargs.pop(name)))
            return method(self, *args, **kwargs)

        call.__signature__ = inspect.signature(method)  # type: ignore[attr-defined] # Keras reads the signature of layers
        return call

    return make


def _add_names() -> None:
    """Put names into `keras` and `tf.keras`, and make `tensorflow.keras.*` the modules behind `tf.keras.*`."""
    tf_keras = importlib.import_module(_TF_KERAS)
    keras.preprocessing.text = sys.modules["keras.preprocessing.text"] = tf_keras.preprocessing.text
    for name in _PAIRED_MODULES:
        both = {**_public(_inside(tf_keras, name)), **_public(_inside(keras, name))}
        if name == "backend":
            both = {name: _unwrapping(function) for name, function in both.items()}
        for api in (keras, tf_keras):
            vars(_inside(api, name)).update(both)
    keras.Variable.ref = lambda variable: _Reference(variable)
    for api in (keras, tf_keras):
        for name in _OPTIMIZERS:
            kind = getattr(keras.optimizers, name)
            setattr(_inside(api, "optimizers.legacy"), name, kind)
            if name not in _ONLY_CAPITALIZED:
                setattr(api.optimizers, name.lower(), kind)
        for name, older in _MODULES.items():
            module = _inside(api, name)
            for child in older:
                sys.modules[f"{api.__name__}.{name}.{child}"] = module
                vars(module).setdefault(child, module)
    # Otherwise an import of tensorflow.keras.losses would load the same file again, without the added names.
    for name in list(sys.modules):
        if name.startswith(_TF_KERAS):
            sys.modules[name.replace(_TF_KERAS, "tensorflow.keras", 1)] = sys.modules[name]


def _inside(module: Any, path: str) -> Any:
    return importlib.import_module(f"{module.__name__}.{path}")


def _public(module: ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


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
