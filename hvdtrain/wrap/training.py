"""`fit`, `evaluate`, `predict` and their `..._on_batch`, run by all ranks together as if by one process."""

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import keras

from hvdtrain.collectives.engine import Engine
from hvdtrain.patching import replace_where_defined
from hvdtrain.wrap import (
    context,
    data_reading,
    native_files,
    optimizers,
    randomness,
    refusals,
    same_batches,
    scaled_batch,
)
from hvdtrain.wrap.lockstep import followed

_METHODS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")
_ARRAYS = ("x", "y", "sample_weight")


def install(engine: Engine, scale_batch: bool) -> None:
    """Changes the methods of Keras' trainer.

    Args:
        engine: The ranks.
        scale_batch: Whether the batch is multiplied by their number.
    """
    for name in _METHODS:
        replace_where_defined(keras.Model, name, lambda method: _together(engine, method, scale_batch))
    replace_where_defined(keras.Model, "compile", lambda method: _without_xla(engine, method))
    data_reading.install(engine)


def _together(engine: Engine, method: Callable[..., Any], scale_batch: bool) -> Callable[..., Any]:
    signature, name = inspect.signature(method), method.__name__

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        with _at_work(engine, self, name) as outermost:
            if name.endswith("_on_batch"):
                arrays = {each: given.arguments[each] for each in _ARRAYS if each in given.arguments}
                given.arguments.update(same_batches.agreed(engine, arrays))
            if name == "fit" and outermost:
                if scale_batch:
                    scaled_batch.prepare(engine, self, given.arguments)
                given.arguments["callbacks"] = followed(engine, given.arguments.get("callbacks"))
            return method(*given.args, **given.kwargs)

    return run


@contextlib.contextmanager
def _at_work(engine: Engine, model: Any, name: str) -> Iterator[bool]:
    """Makes a model's optimizers and steps those of all ranks; afterwards the ranks draw alike again."""
    outermost = context.engine() is None
    if outermost:
        _check_backend()
        refusals.check_thread(f"model.{name}")
        if not name.endswith("_on_batch"):
            native_files.follow(engine)
    for each in optimizers.of_model(model):
        optimizers.distribute(each)
    if model.jit_compile:
        model.jit_compile = False
        model.train_function = model.test_function = model.predict_function = None
    with context.of_all_ranks(engine), data_reading.of(model, name):
        yield outermost
    if outermost and not name.endswith("_on_batch"):
        randomness.align(engine)


def _check_backend() -> None:
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        raise RuntimeError(
            f"hvdtrain run --wrap trains on Keras' TensorFlow backend, and KERAS_BACKEND is {backend}. "
            "Leave that out, or start the script with python."
        )


def _without_xla(engine: Engine, method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    def compile_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        if given.arguments.get("jit_compile") is True:
            engine.say(
                "jit_compile=True is turned off: nothing can be sent to other ranks from an XLA program."
            )
        given.arguments["jit_compile"] = False
        return method(*given.args, **given.kwargs)

    return compile_model
