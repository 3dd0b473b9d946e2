"""Calls of Keras 2 that Horovod's documentation prescribes and Keras 3 has dropped; for old scripts only."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from hvdtrain.replacing import AfterImport, definer

# Arguments that decided nothing a result depends on: how data is fetched, how the step is traced.
_DROPPED = {
    "compile": ("experimental_run_tf_function",),
    "fit": ("max_queue_size", "workers", "use_multiprocessing"),
    "evaluate": ("max_queue_size", "workers", "use_multiprocessing"),
    "predict": ("max_queue_size", "workers", "use_multiprocessing"),
}

_OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "Adamax", "Ftrl", "Nadam", "Optimizer", "RMSprop", "SGD")


def install_with_keras() -> None:
    """Changes Keras now if it is loaded, else as soon as the script has loaded it."""
    if "keras" in sys.modules:
        install()
    else:
        sys.meta_path.insert(0, AfterImport("keras", install))


def install() -> None:
    """Puts the calls back. What Keras 3 accepts means what it meant."""
    import keras

    if keras.__version__.startswith("2.") or keras.backend.backend() != "tensorflow":
        return  # hvdtrain.keras refuses both, and says why
    _change_models(keras.Model)
    _change_optimizers(definer(keras.optimizers.Optimizer, "variables"))
    for api in (keras, importlib.import_module("keras._tf_keras.keras")):
        api.backend.get_value, api.backend.set_value = _get_value, _set_value
        legacy = importlib.import_module(f"{api.__name__}.optimizers.legacy")
        vars(legacy).update({name: getattr(keras.optimizers, name) for name in _OPTIMIZERS})
    images = importlib.import_module("keras._tf_keras.keras.preprocessing.image")
    vars(keras.preprocessing.image).update(_public(images))


def _change_models(model: Any) -> None:
    for method, names in _DROPPED.items():
        owner = definer(model, method)
        setattr(owner, method, _without(vars(owner)[method], names))
    trainer = definer(model, "fit")
    trainer.fit_generator, trainer.evaluate_generator = _fit_generator, _evaluate_generator
    trainer.predict_generator = _predict_generator


def _without(method: Any, names: Sequence[str]) -> Any:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **{name: each for name, each in kwargs.items() if name not in names})

    call.__signature__ = _with_parameters(method, names)
    return call


def _with_parameters(method: Any, names: Sequence[str]) -> inspect.Signature:
    """Return a signature with more keywords, for functions put around this one that bind their arguments."""
    signature = inspect.signature(method)
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in signature.parameters.values()):
        return signature
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    return signature.replace(parameters=[*signature.parameters.values(), *more])


def _fit_generator(
    self: Any,
    generator: Any,
    steps_per_epoch: int | None = None,
    epochs: int = 1,
    verbose: Any = 1,
    callbacks: Any = None,
    validation_data: Any = None,
    validation_steps: int | None = None,
    validation_freq: int = 1,
    class_weight: Any = None,
    max_queue_size: int = 10,
    workers: int = 1,
    use_multiprocessing: bool = False,
    shuffle: bool = True,
    initial_epoch: int = 0,
) -> Any:
    return self.fit(
        generator,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        verbose=verbose,
        callbacks=callbacks,
        validation_data=validation_data,
        validation_steps=validation_steps,
        validation_freq=validation_freq,
        class_weight=class_weight,
        shuffle=shuffle,
        initial_epoch=initial_epoch,
    )


def _evaluate_generator(
    self: Any,
    generator: Any,
    steps: int | None = None,
    callbacks: Any = None,
    max_queue_size: int = 10,
    workers: int = 1,
    use_multiprocessing: bool = False,
    verbose: Any = 0,
) -> Any:
    return self.evaluate(generator, steps=steps, callbacks=callbacks, verbose=verbose)


def _predict_generator(
    self: Any,
    generator: Any,
    steps: int | None = None,
    callbacks: Any = None,
    max_queue_size: int = 10,
    workers: int = 1,
    use_multiprocessing: bool = False,
    verbose: Any = 0,
) -> Any:
    return self.predict(generator, steps=steps, callbacks=callbacks, verbose=verbose)


def _change_optimizers(base: Any) -> None:
    base.__init__ = _taking_lr(base.__init__)
    base.lr = property(lambda self: self.learning_rate, _set_rate)
    for kind in _with_subclasses(base):
        own = vars(kind).get("variables")
        if isinstance(own, property):
            kind.variables = property(_callable(own.fget))


def _taking_lr(init: Any) -> Any:
    @functools.wraps(init)
    def __init__(self: Any, learning_rate: Any = None, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        rate = kwargs.pop("lr", learning_rate)
        decay = kwargs.pop("decay", None)
        if decay:
            raise ValueError(
                f"{type(self).__name__}(decay={decay!r}): optimizers of Keras 3 have no decay of the learning "
                f"rate. Write learning_rate=keras.optimizers.schedules.InverseTimeDecay({rate!r}, decay_steps=1, "
                f"decay_rate={decay!r}), which means the same."
            )
        init(self, rate, *args, **kwargs)

    return __init__


def _set_rate(optimizer: Any, rate: Any) -> None:
    optimizer.learning_rate = rate


class _Callable(list):
    """A list of variables that old scripts ask for as `optimizer.variables()`."""

    def __call__(self) -> list[Any]:
        return self


def _callable(variables: Any) -> Callable[[Any], _Callable]:
    return lambda self: _Callable(variables(self))


def _get_value(x: Any) -> Any:
    return x.numpy() if hasattr(x, "numpy") else x


def _set_value(x: Any, value: Any) -> None:
    x.assign(value)


def _with_subclasses(kind: Any) -> Iterator[Any]:
    yield kind
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


def _public(module: ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}
