"""Accept calls and names of Keras 2 on Keras 3, each with the reason why this is safe."""

import inspect
import math
import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hvdtrain.patching import AfterImport, definer, replace_outermost

# A function that takes the value of an argument of Keras 2 and returns the arguments of Keras 3 with that meaning.
Meaning = Callable[[Any], dict[str, Any]]


def _ignored(value: Any) -> dict[str, Any]:
    return {}


def _rounded_up(name: str) -> Meaning:
    return lambda value: {name: math.ceil(value) if isinstance(value, float) else value}


def _renamed(name: str) -> Meaning:
    return lambda value: {name: value}


class _Arguments(NamedTuple):
    """Arguments of one method, their meaning on Keras 3, and the reason."""

    owner: str
    method: str
    meanings: Mapping[str, Meaning]
    reason: str


_FETCHING = dict.fromkeys(("max_queue_size", "workers", "use_multiprocessing"), _ignored)
_TENSORBOARD = ("batch_size", "write_grads", "embeddings_layer_names", "embeddings_data")

_ARGUMENTS = (
    _Arguments(
        "Model",
        "compile",
        dict.fromkeys(("experimental_run_tf_function", "sample_weight_mode"), _ignored),
        "They chose how a step was traced, and allowed sample weights of several axes, as Keras 3 always does.",
    ),
    *(
        _Arguments("Model", method, _FETCHING, "They chose how data was fetched, not which data.")
        for method in ("fit", "evaluate", "predict")
    ),
    *(
        _Arguments(
            "Model",
            method,
            {name: _rounded_up(name)},
            "Keras 2 counted until this number was reached: 4.5 steps were 5.",
        )
        for method, name in (
            ("fit", "steps_per_epoch"),
            ("fit", "validation_steps"),
            ("evaluate", "steps"),
            ("predict", "steps"),
        )
    ),
    _Arguments(
        "layers.BatchNormalization", "__init__", {"fused": _ignored}, "It chose a kernel of TensorFlow."
    ),
    _Arguments(
        "callbacks.TensorBoard",
        "__init__",
        dict.fromkeys(_TENSORBOARD, _ignored),
        "TensorFlow 2 already ignored them.",
    ),
    _Arguments(
        "callbacks.ReduceLROnPlateau", "__init__", {"epsilon": _renamed("min_delta")}, "It is the older name."
    ),
    _Arguments(
        "optimizers.Optimizer",
        "apply_gradients",
        dict.fromkeys(("name", "experimental_aggregate_gradients", "skip_gradients_aggregation"), _ignored),
        "They named an operation, or concerned the replicas of a tf.distribute strategy.",
    ),
    _Arguments(
        "optimizers.Optimizer",
        "__init__",
        {"jit_compile": _ignored},
        "In Keras 3 it is an argument of compile.",
    ),
)


def install_with_keras() -> None:
    """Change Keras now if it is loaded, otherwise as soon as the script has loaded it."""
    if "keras" in sys.modules:
        install()
    else:
        sys.meta_path.insert(0, AfterImport("keras", install))


def install() -> None:
    """Restore the calls and names. What Keras 3 accepts keeps its meaning."""
    import keras

    if keras.__version__.startswith("2.") or keras.backend.backend() != "tensorflow":
        return  # hvdtrain.keras rejects both with a message
    from hvdtrain.as_horovod import keras2_names, keras2_optimizers, keras2_training

    keras2_names.install(keras)
    keras2_training.install(keras)
    keras2_optimizers.install(keras)
    methods: dict[tuple[str, str], dict[str, Meaning]] = {}
    for arguments in _ARGUMENTS:
        methods.setdefault((arguments.owner, arguments.method), {}).update(arguments.meanings)
    for (owner, method), meanings in methods.items():
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
