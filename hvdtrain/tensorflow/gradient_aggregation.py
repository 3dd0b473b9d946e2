"""Combine the gradients of custom training loops: over all ranks, and over several backward passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
from hvdtrain.data.global_batch import weighted
from hvdtrain.gradients.options import ReduceOptions
from hvdtrain.gradients.reducer import GradientReducer
from hvdtrain.gradients.schemes import State
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.gradients.verification import Policy, Verification
from hvdtrain.runtime.process_sets import ProcessSet, engine_or_alone, global_process_set
from hvdtrain.tensorflow.util import check_adasum


class Reduction:
    """A function that combines the gradients of a tape or an optimizer over all ranks. Gradients may be None.

    The weights are verified at the second step, because scripts written for Horovod broadcast them after the first.
    Different weights cause a warning there, and an error if they still differ at the tenth step.

    Args:
        options: How to combine the gradients.
        process_set: The ranks that take part. On other ranks gradients stay unchanged.
    """

    def __init__(self, options: ReduceOptions, process_set: ProcessSet) -> None:
        engine = engine_or_alone(process_set)
        check_adasum(engine, options.op)
        self._engine, self._options = engine, options
        verification = Verification(engine, options, Policy(0))
        self._reducer = GradientReducer(engine, TensorFlowBridge(), options, verification)
        self.keep_local = self._reducer.keep_local
        self.is_local = self._reducer.is_local

    def __call__(self, gradients: Sequence[Any], sources: Sequence[Any]) -> list[Any]:
        """Reduce the gradients of one step.

        Args:
            gradients: Tensors, `tf.IndexedSlices` or None.
            sources: The variables or tensors to which they belong.

        Raises:
            MismatchError: On every rank, if the ranks do not have gradients of the same sources.
        """
        result = weighted(gradients)
        indices = [index for index, gradient in enumerate(result) if gradient is not None]
        if indices:
            self._reducer.name = f"{self._options.name}.{_number_in_graph()}"
            trained = [sources[index] for index in indices]
            self._reducer.verification = self._verification(trained)
            self._reducer.scheme_state = self._kept(trained, repr(self._options.scheme), State())
            named = [_named(sources[index], index) for index in indices]
            reduced = self._reducer([result[index] for index in indices], named, [])
            for index, gradient in zip(indices, reduced, strict=True):
                result[index] = gradient
        return result

    def _verification(self, sources: Sequence[Any]) -> Verification:
        """Return the verification of these variables."""
        in_session = not (tf.executing_eagerly() or tf.inside_function())
        if in_session or not all(hasattr(source, "assign") for source in sources):
            return Verification(self._engine, self._options, Policy(0))
        policy = replace(Policy.from_environment(), first=1, strict=False, again=True)
        return self._kept(sources, Verification, Verification(self._engine, self._options, policy))

    def _kept(self, sources: Sequence[Any], kind: Any, new: Any) -> Any:
        """Return what was kept for a reduction of these sources, or keep `new`: each step may use a new tape."""
        if not hasattr(sources[0], "assign"):
            return new
        # Stored in the first variable, so that it lives as long as the variables that it is about.
        kept = sources[0].__dict__.setdefault("_hvdtrain_kept", {})
        key = (id(self._engine), self._options.op, kind, *(id(source) for source in sources))
        return kept.setdefault(key, new)


@dataclass(frozen=True)
class _NamedTensor:
    """A name and the shape of a tensor among the sources, because the name of a tensor is not meaningful."""

    name: str
    shape: Any


def _named(source: Any, index: int) -> Any:
    return source if hasattr(source, "assign") else _NamedTensor(f"source {index}", source.shape)


def _number_in_graph() -> int:
    """Return the number of earlier reductions in this graph: two may run at once and need different names.

    The count starts at 0 in each graph. With a common count, the names would differ between ranks if a function is
    traced again on one rank only.
    """
    if tf.executing_eagerly():
        return 0
    reductions = tf.compat.v1.get_default_graph().get_collection_ref("hvdtrain_reductions")
    reductions.append(None)
    return len(reductions) - 1


class LocalGradientAggregationHelper:
    """An accumulator of gradients that reduces them once per window, so that the ranks communicate less often.

    Keras optimizers do this themselves (`backward_passes_per_step` of `hvd.DistributedOptimizer`). This class is
    for the optimizers of `tf.compat.v1.train`, eagerly and in a `tf.function`.

    Args:
        backward_passes_per_step: Number of backward passes in a window.
        allreduce_func: Function that takes gradients and their variables and returns the reduced gradients.
        sparse_as_dense: Whether to make sparse gradients dense; only dense gradients can be accumulated.
        average_aggregated_gradients: Whether to divide the sum of a window by its number of passes.
        rank: Ignored, as is `optimizer_type`; accepted for compatibility with Horovod.
        process_set: The ranks that train together.
        scale_local_gradients: Whether to divide gradients of local variables by the number of ranks.
        name: Prefix of the name of the counter variable.

    Raises:
        ValueError: If `backward_passes_per_step` is not a positive number.
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
        """Exclude the gradient of a variable from the reduction: it stays on its rank."""
        self._local.append(var)
        registry.note_local(var)

    def compute_gradients(self, grads: Sequence[Any], vars: Sequence[Any]) -> list[Any]:
        """Add the gradients of one backward pass to the window.

        Args:
            grads: Tensors, `tf.IndexedSlices` or None.
            vars: The variables of the gradients.

        Returns:
            The reduced gradients at the end of a window, otherwise `grads`.

        Raises:
            NotImplementedError: In a graph of TensorFlow 1, which does not run the assignments in order.
        """
        if not (tf.executing_eagerly() or tf.inside_function()):
            passes = self.backward_passes_per_step
            raise NotImplementedError(
                f"backward_passes_per_step={passes} does not work in a graph of TensorFlow 1. Leave it out and "
                f"feed batches {passes} times as large to session.run."
            )
        indices = [index for index, grad in enumerate(grads) if grad is not None]
        dense = [self._dense(grads[index]) for index in indices]
        variables = [vars[index] for index in indices]
        if self.counter is None:
            with tf.init_scope():
                self.counter = tf.Variable(0, trainable=False, name=f"{self.name}counter")
                self._sums = [
                    tf.Variable(tf.zeros(grad.shape, grad.dtype), trainable=False) for grad in dense
                ]
        sums = [total.assign_add(grad) for total, grad in zip(self._sums, dense, strict=True)]
        with tf.control_dependencies(sums):
            passes = self.counter.assign_add(1)
        is_full = tf.equal(passes, self.backward_passes_per_step)
        results = tf.cond(
            is_full, lambda: self._end_window(variables), lambda: [tf.identity(grad) for grad in dense]
        )
        gradients: list[Any] = [None] * len(grads)
        for index, result in zip(indices, results, strict=True):
            gradients[index] = result
        return gradients

    def apply_gradients(
        self, apply_grads_closure: Callable[[], Any], optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Apply gradients with `apply_grads_closure` if a window has just ended.

        If the optimizer has `iterations`, they count the other passes too. Further arguments are not used.
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

    def _end_window(self, variables: Sequence[Any]) -> list[Any]:
        """Reduce the accumulated gradients and set the sums to zero."""
        accumulated = [tf.identity(total) for total in self._sums]
        shared = [
            index
            for index, variable in enumerate(variables)
            if not any(variable is local for local in self._local)
        ]
        reduced = self._reduce(
            [accumulated[index] for index in shared], [variables[index] for index in shared]
        )
        ranks = (self.process_set.size() or 1) if self.scale_local_gradients else 1
        results = [grad / ranks for grad in accumulated]
        for index, result in zip(shared, reduced, strict=True):
            results[index] = result
        with tf.control_dependencies(results):
            for total in self._sums:
                total.assign(tf.zeros_like(total))
            self.counter.assign(0)
        passes = self.backward_passes_per_step if self.average_aggregated_gradients else 1
        return [grad / passes for grad in results]

    def _dense(self, gradient: Any) -> Any:
        if isinstance(gradient, tf.IndexedSlices) and not self.sparse_as_dense:
            raise ValueError(
                "Sparse gradients (tf.IndexedSlices) can be added up over several backward passes only as dense "
                "gradients: pass sparse_as_dense=True."
            )
        return tf.convert_to_tensor(gradient)
