"""Several backward passes for one update, for optimizers that cannot add up gradients themselves."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvdtrain.gradients.trained_variables import registry
from hvdtrain.runtime.process_sets import ProcessSet, global_process_set


class LocalGradientAggregationHelper:
    """Adds up gradients on this rank and reduces them once a window, so that the ranks communicate less often.

    Keras' optimizers do this themselves (`backward_passes_per_step` of `hvd.DistributedOptimizer`); this serves
    those of `tf.compat.v1.train`, eagerly and in a `tf.function`.

    Args:
        backward_passes_per_step: Passes a window.
        allreduce_func: Takes gradients and their variables and returns the reduced gradients.
        sparse_as_dense: Makes sparse gradients dense; only dense ones can be added up.
        average_aggregated_gradients: Divides the sum of a window by its number of passes.
        rank: Accepted for Horovod's sake, as `optimizer_type` and `name`.
        optimizer_type: One of the class's two constants.
        process_set: Which ranks train together.
        scale_local_gradients: Divides gradients of local variables by the number of ranks.
        name: Name of the counter.

    Raises:
        ValueError: If `backward_passes_per_step` is no positive number.
    """

    _OPTIMIZER_TYPE_KERAS = "optimizer_type_keras"
    _OPTIMIZER_TYPE_LEGACY = "optimizer_type_legacy"

    def __init__(
        self,
        backward_passes_per_step: int,
        allreduce_func: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]],
        sparse_as_dense: bool,
        average_aggregated_gradients: bool,
        rank: int,
        optimizer_type: str,
        process_set: ProcessSet = global_process_set,
        scale_local_gradients: bool = True,
        name: str = "",
    ) -> None:
        if backward_passes_per_step < 1:
            raise ValueError(
                f"backward_passes_per_step must be at least 1. Received: {backward_passes_per_step}."
            )
        self.backward_passes_per_step = backward_passes_per_step
        self.average_aggregated_gradients = average_aggregated_gradients
        self.sparse_as_dense = sparse_as_dense
        self.process_set = process_set
        self.scale_local_gradients = scale_local_gradients
        self.name = name
        self._reduce = allreduce_func
        self._local: list[Any] = []
        self._sums: list[Any] = []
        self.counter: Any = None

    def register_local_var(self, var: Any) -> None:
        """Leave the gradient of a variable on its rank."""
        self._local.append(var)
        registry.note_local(var)

    def compute_gradients(self, grads: Sequence[Any], vars: Sequence[Any]) -> list[Any]:
        """Add a pass's gradients to the window.

        Args:
            grads: Tensors, `tf.IndexedSlices` or None.
            vars: Their variables.

        Returns:
            At the end of a window the reduced gradients, otherwise those that were given.

        Raises:
            NotImplementedError: In a graph of TensorFlow 1, which does not run the assignments in order.
        """
        if not (tf.executing_eagerly() or tf.inside_function()):
            passes = self.backward_passes_per_step
            raise NotImplementedError(
                f"backward_passes_per_step={passes} does not work in a graph of TensorFlow 1. Leave it out and "
                f"feed batches {passes} times as large to session.run."
            )
        there = [index for index, each in enumerate(grads) if each is not None]
        given = [self._dense(grads[index]) for index in there]
        variables = [vars[index] for index in there]
        self._make_variables(given)
        sums = [total.assign_add(each) for total, each in zip(self._sums, given, strict=True)]
        with tf.control_dependencies(sums):
            passes = self.counter.assign_add(1)
        full = tf.equal(passes, self.backward_passes_per_step)
        results = tf.cond(
            full, lambda: self._window(variables), lambda: [tf.identity(each) for each in given]
        )
        gradients: list[Any] = [None] * len(grads)
        for index, result in zip(there, results, strict=True):
            gradients[index] = result
        return gradients

    def apply_gradients(
        self, apply_grads_closure: Callable[[], Any], optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Apply gradients if a window has just ended.

        Args:
            apply_grads_closure: Applies them.
            optimizer: Its `iterations`, if it has any, count the other passes too.
            *args: Not used.
            **kwargs: Not used.
        """

        def skip() -> Any:
            iterations = getattr(optimizer, "iterations", None)
            if iterations is not None:
                iterations.assign_add(1)
            return tf.constant(False)

        def apply() -> Any:
            done = apply_grads_closure()
            with tf.control_dependencies([] if done is None else [done]):
                return tf.constant(True)

        return tf.cond(tf.equal(self.counter, 0), apply, skip)

    def _window(self, variables: Sequence[Any]) -> list[Any]:
        """Reduce what was added up, and begins anew."""
        added_up = [tf.identity(each) for each in self._sums]
        shared = [index for index, each in enumerate(variables) if not self._is_local(each)]
        reduced = self._reduce([added_up[index] for index in shared], [variables[index] for index in shared])
        share = (self.process_set.size() or 1) if self.scale_local_gradients else 1
        results = [each / share for each in added_up]
        for index, result in zip(shared, reduced, strict=True):
            results[index] = result
        with tf.control_dependencies(results):
            for each in self._sums:
                each.assign(tf.zeros_like(each))
            self.counter.assign(0)
        passes = self.backward_passes_per_step if self.average_aggregated_gradients else 1
        return [each / passes for each in results]

    def _is_local(self, variable: Any) -> bool:
        return any(variable is each for each in self._local)

    def _dense(self, gradient: Any) -> Any:
        if isinstance(gradient, tf.IndexedSlices) and not self.sparse_as_dense:
            raise ValueError(
                "Sparse gradients (tf.IndexedSlices) can be added up over several backward passes only as dense "
                "ones: pass sparse_as_dense=True."
            )
        return tf.convert_to_tensor(gradient)

    def _make_variables(self, gradients: Sequence[Any]) -> None:
        if self.counter is None:
            with tf.init_scope():
                self.counter = tf.Variable(0, trainable=False, name=f"{self.name}counter")
                self._sums = [
                    tf.Variable(tf.zeros(each.shape, each.dtype), trainable=False) for each in gradients
                ]
