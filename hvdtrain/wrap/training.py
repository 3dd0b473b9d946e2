"""Run `fit`, `evaluate`, `predict` and their `..._on_batch` forms on all ranks together, like on one process."""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

import hvdtrain.keras  # noqa: F401 - checks the version of Keras before other modules use it
from hvdtrain import runtime
from hvdtrain.collectives.engine import Engine
from hvdtrain.data import structures
from hvdtrain.keras.optimizer.distributed import DistributedOptimizer, is_distributed
from hvdtrain.keras.patches import model_fit
from hvdtrain.keras.world import init
from hvdtrain.patching import replace_where_defined
from hvdtrain.wrap import (
    fit_arguments,
    layers,
    model_calls,
    native_files,
    randomness,
    same_batches,
    script_errors,
)
from hvdtrain.wrap.row_shard import current, running

_METHODS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")
_CUSTOM_LOOP = (
    "hvdtrain run --wrap: {name}.apply is called outside of model.fit and model.train_on_batch. A script with a "
    "custom training loop must divide its work among the ranks itself: import hvdtrain.keras as hvd, call "
    "hvd.init(), make the optimizer hvd.DistributedOptimizer({name}(...)), give each rank its part of the data "
    "with hvd.shard, and start it with hvdtrain run without --wrap. Nothing was updated."
)


def install(scale_batch: bool) -> None:
    """Join the ranks and make Keras work for all of them together.

    Args:
        scale_batch: Whether each rank keeps the batch size of the script.
    """
    init()
    model_fit.let_data_be_equal()  # every rank reads all data and computes only its rows
    engine = runtime.engine()
    randomness.install(engine)
    model_calls.install()
    layers.install()
    replace_where_defined(keras.optimizers.Optimizer, "apply", _applying_on_all_ranks)
    for name in _METHODS:
        replace_where_defined(keras.Model, name, lambda method: _together(engine, method, scale_batch))
    replace_where_defined(keras.Model, "compile", lambda method: _without_xla(engine, method))
    same_batches.install(engine)
    native_files.install(engine)
    script_errors.reject_strategies()


def _together(engine: Engine, method: Callable[..., Any], scale_batch: bool) -> Callable[..., Any]:
    """Let all ranks run a method of a model together; afterwards their random states are equal again."""
    signature, name = inspect.signature(method), method.__name__
    on_batch = name.endswith("_on_batch")

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        outermost = current().engine is None
        if outermost:
            script_errors.check_thread(f"model.{name}")
        if outermost and not on_batch:
            native_files.see_files_of_rank_zero(engine)
        _prepare(self)
        fits = outermost and name == "fit"
        factor = engine.size if fits and scale_batch else 1
        with running(engine=engine), same_batches.read_by(self, name, factor):
            if on_batch:
                arrays = {key: given.arguments[key] for key in structures.NAMES if key in given.arguments}
                given.arguments.update(same_batches.agreed(engine, arrays))
            if fits and scale_batch:
                fit_arguments.scale(engine, self, given.arguments)
            if fits:
                fit_arguments.add_callbacks(engine, self, given.arguments)
            result = method(*given.args, **given.kwargs)
        if outermost and not on_batch:
            randomness.align(engine)
        return result

    return run


def _prepare(model: Any) -> None:
    for optimizer in fit_arguments.optimizers_of(model):
        _distribute(optimizer)
    if model.jit_compile:
        model.jit_compile = False
        model.train_function = model.test_function = model.predict_function = None


def _distribute(optimizer: Any) -> None:
    """Make an optimizer average over the ranks from now on. The object and its state stay the same."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
    if not is_distributed(inner):
        with tf.init_scope():  # TensorFlow may be tracing a graph
            inner.__class__ = type(DistributedOptimizer(inner))


def _applying_on_all_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        if current().engine is None:
            raise RuntimeError(_CUSTOM_LOOP.format(name=type(self).__name__))
        _distribute(self)
        return original(self, grads, trainable_variables)

    return apply


def _without_xla(engine: Engine, method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    def compile_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        if given.arguments.get("jit_compile") is True:
            engine.say("jit_compile=True is turned off: an XLA program cannot communicate with other ranks.")
        given.arguments["jit_compile"] = False
        return method(*given.args, **given.kwargs)

    return compile_model
