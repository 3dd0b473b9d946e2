"""A step in two parts where XLA is wanted: forward and backward pass are compiled, what follows is not.

No collective can run inside of an XLA program. So Keras' own train step is compiled up to the gradients; these come
out of the program, and are averaged and applied as in any other step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.patching import replace_where_defined


def install(concerns: Callable[[Any], bool]) -> None:
    """Put the two parts into Keras. Once is enough.

    Args:
        concerns: Tells of a model whether its gradients go to other ranks.
    """
    replace_where_defined(keras.Model, "train_step", lambda step: _in_parts(step, concerns))
    replace_where_defined(keras.Model, "make_train_function", lambda make: _outside(make, concerns))


def can_be_divided(model: Any) -> bool:
    """Return whether a model trains by Keras' own step, which is known to end with its gradients."""
    return type(model).train_step is keras.Model.train_step


def _outside(make: Callable[..., Any], concerns: Callable[[Any], bool]) -> Callable[..., Any]:
    """Keep XLA away from the whole of a step that is to be compiled in part."""

    def make_train_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self.jit_compile and concerns(self)):
            return make(self, *args, **kwargs)
        self.jit_compile = False
        try:
            return make(self, *args, **kwargs)
        finally:
            self.jit_compile = True

    return make_train_function


def _in_parts(step: Callable[..., Any], concerns: Callable[[Any], bool]) -> Callable[..., Any]:
    def train_step(self: Any, data: Any) -> Any:
        # By hand, step by step, each call would make a program of its own.
        if not tf.inside_function() or not (self.jit_compile and concerns(self)):
            return step(self, data)
        variables: list[Any] = []

        @tf.function(jit_compile=True, reduce_retracing=True, autograph=False)
        def up_to_the_gradients(data: Any) -> Any:
            with _caught(self.optimizer) as pairs:
                logs = step(self, data)
            variables[:] = [variable for _, variable in pairs]
            return logs, [gradient for gradient, _ in pairs]

        if _communicates(up_to_the_gradients.get_concrete_function(data)):
            self.jit_compile = False
            runtime.engine().say(
                f"jit_compile is turned off for this model: {type(self).__name__} asks other ranks, or Python, for "
                "something between its input and its gradients, as hvd.SyncBatchNormalization does, and no XLA "
                "program can wait for that."
            )
            return step(self, data)
        logs, gradients = up_to_the_gradients(data)
        if variables:
            self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return logs

    return train_step


def _communicates(program: Any) -> bool:
    """Return whether a traced function calls Python, or Horovod's core: by these the ranks reach each other."""
    graph = program.graph.as_graph_def()
    nodes = [*graph.node, *(node for each in graph.library.function for node in each.node_def)]
    return any("PyFunc" in node.op or node.op.startswith("Horovod") for node in nodes)


@contextmanager
def _caught(optimizer: Any) -> Iterator[list[tuple[Any, Any]]]:
    """Take what an optimizer is told to apply, in place of applying it."""
    pairs: list[tuple[Any, Any]] = []

    def take(grads_and_vars: Any) -> None:
        pairs.extend(grads_and_vars)

    object.__setattr__(optimizer, "apply_gradients", take)
    try:
        yield pairs
    finally:
        object.__delattr__(optimizer, "apply_gradients")
