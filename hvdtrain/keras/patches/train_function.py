"""Compile only the forward and backward pass with XLA, and average and apply the gradients outside of the program.

Keras: with `jit_compile`, `Model.make_train_function` compiles the whole `Model.train_step` to one XLA
program.

On several ranks: no collective can run inside an XLA program, so the gradients could not be averaged.

Replacement: for a model with a distributed optimizer `make_train_function` does not compile the step, and
`train_step` compiles its part up to the gradients. The program returns the gradients, which are averaged and
applied as in any other step. If that part communicates or calls Python, `jit_compile` is turned off, and rank
0 reports it.

Checked with Keras 3.5 to 3.15.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.patching import replace_where_defined


def install(communicates: Callable[[Any], bool]) -> None:
    """Replace `Model.train_step` and `Model.make_train_function`; call this once.

    Args:
        communicates: Returns whether the gradients of a model are sent to other ranks.
    """
    replace_where_defined(keras.Model, "train_step", lambda step: _dividing(step, communicates))
    replace_where_defined(keras.Model, "make_train_function", lambda make: _not_compiling(make, communicates))


def can_be_divided(model: Any) -> bool:
    """Return whether a model uses Keras' own training step, which ends by applying its gradients."""
    return type(model).train_step is keras.Model.train_step


def _not_compiling(make: Callable[..., Any], communicates: Callable[[Any], bool]) -> Callable[..., Any]:
    """Make a training function that is not compiled with XLA as a whole, because its step compiles a part."""

    def make_train_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self.jit_compile and communicates(self)):
            return make(self, *args, **kwargs)
        self.jit_compile = False
        try:
            return make(self, *args, **kwargs)
        finally:
            self.jit_compile = True

    return make_train_function


def _dividing(step: Callable[..., Any], communicates: Callable[[Any], bool]) -> Callable[..., Any]:
    def train_step(self: Any, data: Any) -> Any:
        # Called eagerly, each call of train_step would compile a new program.
        if not tf.inside_function() or not (self.jit_compile and communicates(self)):
            return step(self, data)
        variables: list[Any] = []

        @tf.function(jit_compile=True, reduce_retracing=True, autograph=False)
        def compute_gradients(data: Any) -> Any:
            with _recording_gradients(self.optimizer) as pairs:
                logs = step(self, data)
            variables[:] = [variable for _, variable in pairs]
            return logs, [gradient for gradient, _ in pairs]

        if _calls_python(compute_gradients.get_concrete_function(data)):
            self.jit_compile = False
            runtime.engine().say(
                f"jit_compile is turned off for this model: {type(self).__name__} communicates with other ranks, "
                "or calls Python, between its input and its gradients, as hvd.SyncBatchNormalization does. An XLA "
                "program cannot do this."
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


@contextmanager
def _recording_gradients(optimizer: Any) -> Iterator[list[tuple[Any, Any]]]:
    """Record the gradients and variables that an optimizer is called to apply, without applying them."""
    pairs: list[tuple[Any, Any]] = []

    def record(grads_and_vars: Any) -> None:
        pairs.extend(grads_and_vars)

    object.__setattr__(optimizer, "apply_gradients", record)
    try:
        yield pairs
    finally:
        object.__delattr__(optimizer, "apply_gradients")
