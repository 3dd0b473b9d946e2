"""Compile only the forward and backward pass with XLA, and average and apply the gradients outside of the program.

Keras: with `jit_compile`, `Model.make_train_function` compiles the whole `Model.train_step` to one XLA program.

On several ranks: no collective can run inside an XLA program, so the gradients could not be averaged.

Replacement, for a model with a distributed optimizer: `make_train_function` does not compile the step, and
`train_step` compiles its part up to the gradients. The program returns the gradients, which are averaged and
applied as in any other step. If that part communicates or calls Python, `jit_compile` is turned off, and rank 0
reports it. `Model.compile` does the same if a class defines its own `train_step`, which cannot be divided, because
its parts are not known.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.keras.optimizer.distributed import trains_on_several_ranks
from hvdtrain.patching import replace_where_defined


@functools.cache
def install() -> None:
    """Replace `compile`, `train_step` and `make_train_function` of `Model`. A second call has no effect."""
    # In the class that defines it: a loaded model compiles itself only if its class did not override compile.
    replace_where_defined(keras.Model, "compile", _compiling)
    replace_where_defined(keras.Model, "train_step", _dividing)
    replace_where_defined(keras.Model, "make_train_function", _not_compiling)


def _needs_division(model: Any) -> bool:
    # In this order: `jit_compile` decides when it is first read whether a model supports XLA.
    return trains_on_several_ranks(getattr(model, "optimizer", None)) and bool(model.jit_compile)


def _turn_off(model: Any, reason: str) -> None:
    model.jit_compile = False
    runtime.engine().say(f"jit_compile is turned off for this model: {type(model).__name__} {reason}")


def _compiling(compile_model: Callable[..., Any]) -> Callable[..., Any]:
    def compile_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = compile_model(self, *args, **kwargs)
        if type(self).train_step is not keras.Model.train_step and _needs_division(self):
            _turn_off(
                self,
                "defines its own train_step, and gradients cannot leave an XLA program to be averaged over the "
                "ranks.",
            )
        return result

    return compile_and_check


def _not_compiling(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make a training function that is not compiled with XLA as a whole, because its step compiles a part."""

    def make_train_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _needs_division(self):
            return make(self, *args, **kwargs)
        self.jit_compile = False
        try:
            return make(self, *args, **kwargs)
        finally:
            self.jit_compile = True

    return make_train_function


def _dividing(step: Callable[..., Any]) -> Callable[..., Any]:
    def train_step(self: Any, data: Any) -> Any:
        # Called eagerly, each call of train_step would compile a new program.
        if not tf.inside_function() or not _needs_division(self):
            return step(self, data)
        variables: list[Any] = []

        @tf.function(jit_compile=True, reduce_retracing=True, autograph=False)
        def compute_gradients(data: Any) -> Any:
            with _recording_gradients(self.optimizer) as pairs:
                logs = step(self, data)
            variables[:] = [variable for _, variable in pairs]
            return logs, [gradient for gradient, _ in pairs]

        if _calls_python(compute_gradients.get_concrete_function(data)):
            _turn_off(
                self,
                "communicates with other ranks, or calls Python, between its input and its gradients, as "
                "hvd.SyncBatchNormalization does. An XLA program cannot do this.",
            )
            return step(self, data)
        logs, gradients = compute_gradients(data)
        if variables:
            self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return logs

    return train_step


def _calls_python(program: Any) -> bool:
    """Return whether a traced function calls Python or Horovod's core, through which ranks communicate."""
    graph = program.graph.as_graph_def()
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    return any("PyFunc" in node.op or node.op.startswith("Horovod") for node in nodes)


@contextlib.contextmanager
def _recording_gradients(optimizer: Any) -> Iterator[list[tuple[Any, Any]]]:
    """Record the gradients and variables that an optimizer is called to apply, without applying them."""
    pairs: list[tuple[Any, Any]] = []
    object.__setattr__(optimizer, "apply_gradients", pairs.extend)
    try:
        yield pairs
    finally:
        object.__delattr__(optimizer, "apply_gradients")
