"""Run `fit`, `evaluate`, `predict` and their `..._on_batch` forms on all ranks together, like on one process."""

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
from hvdtrain.wrap.lockstep import with_lockstep_callbacks

_METHODS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")
_ARRAYS = ("x", "y", "sample_weight")


def install(engine: Engine, scale_batch: bool) -> None:
    """Change the methods of the Keras trainer.

    Args:
        engine: The ranks.
        scale_batch: Whether the batch size is multiplied by the number of ranks.
    """
    for name in _METHODS:
        replace_where_defined(keras.Model, name, lambda method: _together(engine, method, scale_batch))
    replace_where_defined(keras.Model, "compile", lambda method: _without_xla(engine, method))
    data_reading.install(engine)


def _together(engine: Engine, method: Callable[..., Any], scale_batch: bool) -> Callable[..., Any]:
    signature, name = inspect.signature(method), method.__name__

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        with _on_all_ranks(engine, self, name) as outermost:
            if name.endswith("_on_batch"):
                arrays = {key: given.arguments[key] for key in _ARRAYS if key in given.arguments}
                given.arguments.update(same_batches.agreed(engine, arrays))
            if name == "fit" and outermost:
                if scale_batch:
                    scaled_batch.prepare(engine, self, given.arguments)
                given.arguments["callbacks"] = with_lockstep_callbacks(
                    engine, given.arguments.get("callbacks")
                )
            return method(*given.args, **given.kwargs)

    return run


@contextlib.contextmanager
def _on_all_ranks(engine: Engine, model: Any, name: str) -> Iterator[bool]:
    """Let all ranks run one method of a model together; afterwards their random states are equal again."""
    outermost = context.engine() is None
    if outermost:
        _check_backend()
        refusals.check_thread(f"model.{name}")
        if not name.endswith("_on_batch"):
            native_files.see_files_of_rank_zero(engine)
    for optimizer in optimizers.of_model(model):
        optimizers.distribute(optimizer)
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
            f"hvdtrain run --wrap needs the TensorFlow backend of Keras, but KERAS_BACKEND is {backend}. "
            "Unset KERAS_BACKEND, or start the script with python."
        )


def _without_xla(engine: Engine, method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    def compile_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        if given.arguments.get("jit_compile") is True:
            engine.say("jit_compile=True is turned off: an XLA program cannot communicate with other ranks.")
        given.arguments["jit_compile"] = False
        return method(*given.args, **given.kwargs)

    return compile_model
