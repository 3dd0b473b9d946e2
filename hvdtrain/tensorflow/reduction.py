"""The way of gradients in loops of your own: into the same pipe as those of a Keras optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from hvdtrain.data.global_batch import weighted
from hvdtrain.gradients.options import ReduceOptions
from hvdtrain.gradients.reducer import GradientReducer
from hvdtrain.gradients.verification import Policy, Verification
from hvdtrain.runtime.process_sets import ProcessSet, engine_or_alone
from hvdtrain.tensorflow.compatibility import check_adasum


class Reduction:
    """Combines the gradients of a tape or an optimizer; there may be None among them.

    The second step is verified, not the first, after which scripts written for Horovod broadcast their variables;
    weights that differ then are reported. If they still differ at the tenth step, they are refused.

    Args:
        options: How gradients are combined.
        process_set: Among which ranks; on others gradients stay their own.
    """

    def __init__(self, options: ReduceOptions, process_set: ProcessSet) -> None:
        engine = engine_or_alone(process_set)
        check_adasum(engine, options.op)
        self._name = options.name
        self._engine, self._options = engine, options
        self._reducer = GradientReducer(engine, options, Verification(engine, options.op, Policy(0)))
        self.keep_local = self._reducer.keep_local
        self.is_local = self._reducer.is_local

    def __call__(self, gradients: Sequence[Any], sources: Sequence[Any]) -> list[Any]:
        """Reduce one step's gradients.

        Args:
            gradients: Tensors, `tf.IndexedSlices` or None.
            sources: The variables, or tensors, that they belong to.

        Returns:
            A list like `gradients`.

        Raises:
            MismatchError: On every rank, if the ranks do not have gradients of the same sources.
        """
        result = weighted(gradients)
        there = [index for index, each in enumerate(result) if each is not None]
        if there:
            self._reducer.name = f"{self._name}.{_number_in_graph()}"
            self._reducer.verification = self._verification([sources[index] for index in there])
            nameable = [_nameable(sources[index], index) for index in there]
            reduced = self._reducer([result[index] for index in there], nameable, [])
            for index, gradient in zip(there, reduced, strict=True):
                result[index] = gradient
        return result

    def _verification(self, sources: Sequence[Any]) -> Verification:
        """Find the proof that belongs to these variables; there may be a new tape in every step."""
        in_session = not (tf.executing_eagerly() or tf.inside_function())
        if in_session or not all(hasattr(each, "assign") for each in sources):
            return Verification(self._engine, self._options.op, Policy(0))
        policy = replace(Policy.from_environment(), first=1, strict=False, again=True)
        made = Verification(self._engine, self._options.op, policy)
        # Kept with the first variable, so that it lives as long as what it verifies.
        proofs = sources[0].__dict__.setdefault("_hvdtrain_proofs", {})
        key = (id(self._engine), self._options.op, *(id(each) for each in sources))
        return proofs.setdefault(key, made)


@dataclass(frozen=True)
class _Watched:
    """Stands for a tensor among the sources: only variables have names that mean something."""

    name: str
    shape: Any


def _nameable(source: Any, index: int) -> Any:
    return source if hasattr(source, "assign") else _Watched(f"source {index}", source.shape)


def _number_in_graph() -> int:
    """Count the reductions of a graph: two may be under way at once, and must not share a name.

    Not across graphs: were a function traced again on one rank only, the ranks would count differently.
    """
    if tf.executing_eagerly():
        return 0
    used = tf.compat.v1.get_default_graph().get_collection_ref("hvdtrain_reductions")
    used.append(None)
    return len(used) - 1
