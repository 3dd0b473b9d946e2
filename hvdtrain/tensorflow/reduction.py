"""Reduce the gradients of custom training loops with the same reducer as those of a Keras optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
from hvdtrain.data.global_batch import weighted
from hvdtrain.gradients.options import ReduceOptions
from hvdtrain.gradients.reducer import GradientReducer
from hvdtrain.gradients.verification import Policy, Verification
from hvdtrain.runtime.process_sets import ProcessSet, engine_or_alone
from hvdtrain.tensorflow.compatibility import check_adasum


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
        self._name = options.name
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

        Returns:
            A list like `gradients`.

        Raises:
            MismatchError: On every rank, if the ranks do not have gradients of the same sources.
        """
        result = weighted(gradients)
        indices = [index for index, gradient in enumerate(result) if gradient is not None]
        if indices:
            self._reducer.name = f"{self._name}.{_number_in_graph()}"
            self._reducer.verification = self._verification([sources[index] for index in indices])
            named = [_named(sources[index], index) for index in indices]
            reduced = self._reducer([result[index] for index in indices], named, [])
            for index, gradient in zip(indices, reduced, strict=True):
                result[index] = gradient
        return result

    def _verification(self, sources: Sequence[Any]) -> Verification:
        """Return the verification of these variables. It outlives a tape, because each step may use a new tape."""
        in_session = not (tf.executing_eagerly() or tf.inside_function())
        if in_session or not all(hasattr(source, "assign") for source in sources):
            return Verification(self._engine, self._options, Policy(0))
        policy = replace(Policy.from_environment(), first=1, strict=False, again=True)
        new = Verification(self._engine, self._options, policy)
        # Stored in the first variable, so that it lives as long as the variables that it verifies.
        verifications = sources[0].__dict__.setdefault("_hvdtrain_verifications", {})
        key = (id(self._engine), self._options.op, *(id(source) for source in sources))
        return verifications.setdefault(key, new)


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
