"""Restore methods of models and callbacks that Keras 3 has removed, and the names of logs in Keras 2."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from hvdtrain.patching import definer, replace, replace_outermost

# Keras 3 uses the second name of the learning rate. Keras before 2.3 used the first name of the accuracy.
_SYNONYMS = (("lr", "learning_rate"), ("acc", "accuracy"), ("val_acc", "val_accuracy"))
_OTHER_NAME = dict([*_SYNONYMS, *((new, old) for old, new in _SYNONYMS)])

# For the threads that fetch batches; a method of Keras 3 does not take them.
_FETCHING = ("max_queue_size", "workers", "use_multiprocessing")

# The arguments of Keras 2 after the generator, in order.
_OF_FIT_GENERATOR = (
    *("steps_per_epoch", "epochs", "verbose", "callbacks", "validation_data", "validation_steps"),
    *("validation_freq", "class_weight", *_FETCHING, "shuffle", "initial_epoch"),
)
_OF_OTHER_GENERATORS = ("steps", "callbacks", *_FETCHING, "verbose")


def install() -> None:
    """Add the methods to models and callbacks."""
    trainer = definer(keras.Model, "fit")
    trainer.fit_generator = _fit_generator
    for name in ("evaluate", "predict"):
        setattr(trainer, f"{name}_generator", _taking_generator(name))
    trainer.predict_classes, trainer.predict_proba = _predict_classes, _predict_proba
    for name in ("train_on_batch", "test_on_batch"):
        replace_outermost(trainer, name, _resetting_metrics)
    keras.Model.reset_states = _reset_states
    keras.layers.Layer.input_shape = property(lambda layer: _shapes(layer.input))
    keras.layers.Layer.output_shape = property(lambda layer: _shapes(layer.output))
    definer(keras.Model, "metrics_names").metrics_names = property(_metrics_names)
    replace(keras.callbacks.ModelCheckpoint, "__init__", _taking_period)
    replace(keras.callbacks.ModelCheckpoint, "on_epoch_end", _every_period)
    replace(keras.callbacks.CallbackList, "on_train_begin", _with_current_names)
    replace(keras.callbacks.CallbackList, "on_epoch_end", _with_both_names)
    replace(keras.callbacks.History, "on_train_begin", _recording_both_names)


def _fit_generator(self: Any, generator: Any, *args: Any, **kwargs: Any) -> Any:
    given = {"verbose": 1, "shuffle": True, **_bound(_OF_FIT_GENERATOR, args, kwargs)}
    # For a Python generator shuffle never had an effect, and Keras 3 would warn.
    given["shuffle"] = given["shuffle"] and isinstance(generator, keras.utils.PyDataset)
    return self.fit(generator, **given)


def _taking_generator(name: str) -> Callable[..., Any]:
    """Return `evaluate_generator` or `predict_generator`, given the name of the method without "_generator"."""

    def run(self: Any, generator: Any, *args: Any, **kwargs: Any) -> Any:
        given = {"verbose": 0, **_bound(_OF_OTHER_GENERATORS, args, kwargs)}
        return getattr(self, name)(generator, **given)

    return run


def _bound(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, without those for threads."""
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    given = inspect.Signature(parameters).bind_partial(*args, **kwargs).arguments
    return {name: value for name, value in given.items() if name not in _FETCHING}


def _predict_proba(self: Any, x: Any, batch_size: int | None = None, verbose: Any = 0) -> Any:
    return self.predict(x, batch_size=batch_size, verbose=verbose)


def _predict_classes(self: Any, x: Any, batch_size: int | None = None, verbose: Any = 0) -> Any:
    predicted = _predict_proba(self, x, batch_size, verbose)
    if predicted.shape[-1] > 1:
        return np.argmax(predicted, axis=-1)
    return (predicted > 0.5).astype("int32")


def _resetting_metrics(method: Callable[..., Any]) -> Callable[..., Any]:
    """Compute metrics of each batch alone by default, as Keras 2 did; Keras 3 accumulates them over batches."""

    def run(self: Any, *args: Any, reset_metrics: bool = True, **kwargs: Any) -> Any:
        if reset_metrics:
            self.reset_metrics()
        return method(self, *args, **kwargs)

    return run


def _reset_states(self: Any) -> None:
    for layer in self._flatten_layers(include_self=False):
        if getattr(layer, "stateful", False) and hasattr(layer, "reset_state"):
            layer.reset_state()


def _shapes(tensors: Any) -> Any:
    """Return the shape of a tensor as a tuple, or a list of shapes for several tensors."""
    if isinstance(tensors, list | tuple):
        return [tuple(tensor.shape) for tensor in tensors]
    return tuple(tensors.shape)


def _metrics_names(model: Any) -> list[str]:
    """Return the name of each value that `evaluate` returns; Keras 3 lists one name, "compile_metrics"."""
    names = []
    for metric in model.metrics:
        several = metric is getattr(model, "_compile_metrics", None)
        names += [compiled.name for compiled in metric.metrics] if several else [metric.name]
    return names


def _taking_period(init: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, period: int = 1, **kwargs: Any) -> None:  # noqa: N807
        init(self, *args, **kwargs)
        self.period, self.epochs_since_last_save = period, 0

    return __init__


def _every_period(on_epoch_end: Callable[..., None]) -> Callable[..., None]:
    def end(self: Any, epoch: int, logs: Any = None) -> None:
        self.epochs_since_last_save += 1
        if self.epochs_since_last_save >= self.period:
            self.epochs_since_last_save = 0
            on_epoch_end(self, epoch, logs)

    return end


class _Logs(dict):
    """Logs that can be read by both of their names, and list only the name that Keras has used."""

    def __missing__(self, name: str) -> Any:
        other = _OTHER_NAME.get(name)
        if other is None or not dict.__contains__(self, other):
            raise KeyError(name)
        return dict.__getitem__(self, other)

    def __contains__(self, name: object) -> bool:
        return dict.__contains__(self, name) or dict.__contains__(self, _OTHER_NAME.get(str(name)))

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name, super().get(str(_OTHER_NAME.get(name)), default))

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _with_both_names(on_epoch_end: Callable[..., None]) -> Callable[..., None]:
    def end(self: Any, epoch: int, logs: Any = None) -> None:
        found = _Logs(logs or {})
        on_epoch_end(self, epoch, found)
        if logs is not None:
            logs.update(found)

    return end


def _recording_both_names(on_train_begin: Callable[..., None]) -> Callable[..., None]:
    def begin(self: Any, logs: Any = None) -> None:
        on_train_begin(self, logs)
        self.history = _Logs(self.history)

    return begin


def _with_current_names(on_train_begin: Callable[..., None]) -> Callable[..., None]:
    """Let callbacks that monitor "acc" use "accuracy", unless the model was compiled with "acc"."""

    def begin(self: Any, logs: Any = None) -> None:
        for callback in self.callbacks:
            if not _has_acc(callback.model):
                _watch_accuracy(callback)
        on_train_begin(self, logs)

    return begin


def _has_acc(model: Any) -> bool:
    compiled = getattr(model, "_compile_metrics", None)
    given = [] if compiled is None else [compiled._user_metrics, compiled._user_weighted_metrics]
    metrics = keras.tree.flatten(given)
    return any(metric == "acc" or getattr(metric, "name", None) == "acc" for metric in metrics)


def _watch_accuracy(callback: Any) -> None:
    monitor, path = getattr(callback, "monitor", None), getattr(callback, "filepath", None)
    if monitor in ("acc", "val_acc"):
        callback.monitor = _OTHER_NAME[monitor]
    if isinstance(path, str):
        for name in ("acc", "val_acc"):
            for end in ("}", ":"):  # {acc} and {acc:.2f}
                path = path.replace("{" + name + end, "{" + _OTHER_NAME[name] + end)
        callback.filepath = path
