"""From backprop to update: takes one rank's gradients and gives back those of all ranks together."""

import itertools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdtrain.backends.tensorflow import bridge
from hvdtrain.collectives.engine import Call, Engine, Op
from hvdtrain.gradients.naming import described_call
from hvdtrain.gradients.options import ReduceOptions, groups_of
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.gradients.verification import Verification

# Reducers are used in the same order on all ranks, so a number at first use tells them apart alike everywhere.
_numbers = itertools.count()


class GradientReducer:
    """Combines the gradients of one optimizer, step by step, and proves the first step.

    Args:
        engine: The engine that moves them; given, never asked for.
        options: How they are combined.
        verification: What proves that the result is right.

    Attributes:
        verification: May be exchanged between steps.
        name: What the operations are called on the wire; chosen at first use if nobody does it before.
    """

    def __init__(self, engine: Engine, options: ReduceOptions, verification: Verification) -> None:
        self._engine = engine
        self._options = options
        self.name = ""
        self.verification = verification
        self._local: list[Any] = []

    def choose_name(self) -> str:
        """Returns the name, chosen now if that has not happened: at a moment that all ranks share."""
        if not self.name:
            self.name = f"{self._options.name}.{next(_numbers)}"
        return self.name

    def keep_local(self, variable: Any) -> None:
        """Leaves the gradients of a variable, which each rank then trains by itself, on their rank."""
        if not any(variable is each for each in self._local):
            self._local.append(variable)
            registry.note_local(variable)

    def is_local(self, variable: Any) -> bool:
        """Tells whether each rank trains a variable by itself."""
        return any(variable is each for each in self._local)

    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any], state: Sequence[Any]) -> list[Any]:
        """Reduces one step's gradients, in a graph or eagerly.

        Args:
            gradients: Tensors or `tf.IndexedSlices`, one for each of `variables`.
            variables: The variables about to be updated; all ranks pass the same, in the same order.
            state: The optimizer's own variables, which must be as equal on all ranks as the weights.

        Returns:
            A list like `gradients`, the same on all ranks except for local variables.

        Raises:
            MismatchError: On every rank, if the ranks do not hold the same variables. Inside a graph it
                comes as TensorFlow's InvalidArgumentError with the same text.
        """
        if self._engine.size == 1:
            return [self._dense_if_asked(each) for each in gradients]
        everywhere = [index for index, each in enumerate(variables) if not self.is_local(each)]
        registry.note_averaged(self._engine, [variables[index] for index in everywhere])
        shared = self._shared(
            [self._dense_if_asked(gradients[index]) for index in everywhere],
            [variables[index] for index in everywhere],
            [] if self._local else state,
        )
        result = [self._scaled_local(each) for each in gradients]
        for index, gradient in zip(everywhere, shared, strict=True):
            result[index] = gradient
        return result

    def _shared(self, gradients: Sequence[Any], variables: Sequence[Any], state: Sequence[Any]) -> list[Any]:
        """Makes the gradients small, sends them, proves what came back, and makes them whole again."""
        wire, contexts = [], []
        for each in gradients:
            small, context = (each, None) if _is_sparse(each) else self._options.compression.compress(each)
            wire.append(small)
            contexts.append(context)
        # That of this trace: another may be in place by the time the graph runs.
        verification = self.verification
        reduced, due = self._reduced(wire, variables, verification)
        unseen = [each for each in wire if not self._is_seen(each)]
        checked = verification.check(due, unseen, reduced, variables, state)
        if checked is not None:
            with tf.control_dependencies([checked]):  # what is wrong must not reach the weights
                reduced = tf.nest.map_structure(tf.identity, reduced, expand_composites=True)
        return [
            each if _is_sparse(each) else self._options.compression.decompress(each, context)
            for each, context in zip(reduced, contexts, strict=True)
        ]

    def _is_seen(self, gradient: Any) -> bool:
        """Tells whether the verification sees a gradient before it is sent; of those in place nothing is left."""
        on_host = bridge.shown_to_numpy(self._engine, self._factors()[2])
        return on_host and not _is_sparse(gradient)

    def _reduced(
        self, gradients: Sequence[Any], variables: Sequence[Any], verification: Verification
    ) -> tuple[list[Any], Any]:
        sparse = [each for each in gradients if _is_sparse(each)]
        dense = [index for index, each in enumerate(gradients) if not _is_sparse(each)]
        before, after, op = self._factors()
        reduced, rows, due = bridge.reduce_gradients(
            self._engine,
            [_times(gradients[index], before) for index in dense],
            [part for each in sparse for part in (self._divided(each.values), each.indices)],
            op,
            self._call(gradients, variables),
            bridge.Watch(
                verification.begin,
                lambda place, array: verification.see(place, array, before),
            ),
            groups_of([variables[index] for index in dense], self._options.groups),
            (self._options.device_dense, self._options.device_sparse),
        )
        dense_left, rows_left = iter(reduced), iter(rows)
        return [  # in the order of the variables
            tf.IndexedSlices(next(rows_left), next(rows_left), each.dense_shape)
            if _is_sparse(each)
            else _times(next(dense_left), after)
            for each in gradients
        ], due

    def _factors(self) -> tuple[float, float, Op]:
        """Returns by what gradients are multiplied before and after they are combined, and how that is done."""
        factor = self._options.predivide_factor
        if factor == 1.0:
            return 1.0, 1.0, self._options.op
        return 1.0 / factor, factor / self._engine.size, Op.SUM

    def _divided(self, values: Any) -> Any:
        """Joining the rows of all ranks sums them; for a mean they are divided before."""
        if self._options.op is Op.ADASUM:
            raise NotImplementedError(
                "Adasum needs the whole gradient, and that of an embedding is sparse. Pass sparse_as_dense=True."
            )
        return values / self._engine.size if self._options.op is Op.AVERAGE else values

    def _scaled_local(self, gradient: Any) -> Any:
        return _times(gradient, 1.0 / self._engine.size) if self._options.scale_local else gradient

    def _dense_if_asked(self, gradient: Any) -> Any:
        return tf.convert_to_tensor(gradient) if self._options.sparse_as_dense else gradient

    def _call(self, gradients: Sequence[Any], variables: Sequence[Any]) -> Call:
        self.choose_name()
        details = [
            f"{gradient.dtype.name}{list(variable.shape)}{', sparse' if _is_sparse(gradient) else ''}"
            for gradient, variable in zip(gradients, variables, strict=True)
        ]
        return described_call(self.name, variables, details)


def _times(gradient: Any, factor: float) -> Any:
    if factor == 1.0:
        return gradient
    if _is_sparse(gradient):
        return tf.IndexedSlices(_times(gradient.values, factor), gradient.indices, gradient.dense_shape)
    return gradient * tf.constant(factor, gradient.dtype)


def _is_sparse(gradient: Any) -> bool:
    return isinstance(gradient, tf.IndexedSlices)
