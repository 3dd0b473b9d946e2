"""From backprop to update: takes one rank's gradients and gives back those of all ranks together."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from hvdtrain.collectives import tensors
from hvdtrain.collectives.base import Call, Engine, Op
from hvdtrain.gradients.naming import described_call
from hvdtrain.gradients.verification import Verification

# Reducers are used in the same order on all ranks, so a number at first use tells them apart alike everywhere.
_numbers = itertools.count()


@dataclass(frozen=True)
class ReduceOptions:
    """How gradients are combined.

    Args:
        name: Names the operations.
        op: `Op.AVERAGE` or `Op.SUM`.
        sparse_as_dense: Makes sparse gradients dense before they travel, instead of gathering their rows.
    """

    name: str
    op: Op = Op.AVERAGE
    sparse_as_dense: bool = False


class GradientReducer:
    """Combines the gradients of one optimizer, step by step, and proves the first step.

    Args:
        engine: The engine that moves them; given, never asked for.
        options: How they are combined.
        verification: What proves that the result is right.
    """

    def __init__(self, engine: Engine, options: ReduceOptions, verification: Verification) -> None:
        self._engine = engine
        self._options = options
        self._name = ""
        self._verification = verification

    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any], state: Sequence[Any]) -> list[Any]:
        """Reduces one step's gradients, in a graph or eagerly.

        Args:
            gradients: Tensors or `tf.IndexedSlices`, one for each of `variables`.
            variables: The variables about to be updated; all ranks pass the same, in the same order.
            state: The optimizer's own variables, which must be as equal on all ranks as the weights.

        Returns:
            A list like `gradients`, the same on all ranks.

        Raises:
            MismatchError: On every rank, if the ranks do not hold the same variables. Inside a graph it
                comes as TensorFlow's InvalidArgumentError with the same text.
        """
        local = [self._dense_if_asked(each) for each in gradients]
        if self._engine.size == 1:
            return local
        reduced = self._reduced(local, self._call(local, variables))
        checked = self._verification.step(local, reduced, variables, state)
        if checked is None:
            return reduced
        with tf.control_dependencies([checked]):  # what is wrong must not reach the weights
            return tf.nest.map_structure(tf.identity, reduced, expand_composites=True)

    def _reduced(self, gradients: Sequence[Any], call: Call) -> list[Any]:
        sparse = [each for each in gradients if _is_sparse(each)]
        dense, rows = tensors.reduce_gradients(
            self._engine,
            [each for each in gradients if not _is_sparse(each)],
            [part for each in sparse for part in (self._scaled(each.values), each.indices)],
            self._options.op,
            call,
        )
        dense_left, rows_left = iter(dense), iter(rows)
        return [
            tf.IndexedSlices(next(rows_left), next(rows_left), each.dense_shape)
            if _is_sparse(each)
            else next(dense_left)
            for each in gradients
        ]

    def _scaled(self, values: Any) -> Any:
        return values / self._engine.size if self._options.op is Op.AVERAGE else values

    def _dense_if_asked(self, gradient: Any) -> Any:
        return tf.convert_to_tensor(gradient) if self._options.sparse_as_dense else gradient

    def _call(self, gradients: Sequence[Any], variables: Sequence[Any]) -> Call:
        if not self._name:
            self._name = f"{self._options.name}.{next(_numbers)}"
        details = [
            f"{gradient.dtype.name}{list(variable.shape)}{', sparse' if _is_sparse(gradient) else ''}"
            for gradient, variable in zip(gradients, variables, strict=True)
        ]
        return described_call(self._name, variables, details)


def _is_sparse(gradient: Any) -> bool:
    return isinstance(gradient, tf.IndexedSlices)
