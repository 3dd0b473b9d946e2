"""Combine one rank's gradients with those of all ranks, between backprop and update."""

import itertools
from collections.abc import Sequence
from typing import Any

from hvdtrain.collectives.engine import Call, Engine, Op
from hvdtrain.gradients.bridge import Bridge, Exchanged, Gradient, Tensor, Variable
from hvdtrain.gradients.exchange import Exchange
from hvdtrain.gradients.naming import compared_name, described_call, variable_name
from hvdtrain.gradients.options import ReduceOptions, groups_of
from hvdtrain.gradients.schemes import Plain, State
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.gradients.verification import Verification

# Reducers are used in the same order on all ranks, so a number at first use identifies them on every rank.
_numbers = itertools.count()


class GradientReducer:
    """A function that combines the gradients of one optimizer, step by step, and verifies the first step.

    Args:
        engine: The engine that moves them.
        bridge: The framework of the gradients.
        options: How they are combined.
        verification: Verifies that the result is correct.

    Attributes:
        verification: May be replaced between steps.
        scheme_state: What the scheme of `options` remembers between the steps.
        name: Name of the operations, the same on all ranks; chosen at first use, or before by `choose_name`.
    """

    def __init__(
        self, engine: Engine, bridge: Bridge, options: ReduceOptions, verification: Verification
    ) -> None:
        self._engine = engine
        self._bridge = bridge
        self._options = options
        self.name = ""
        self.verification = verification
        self._local: list[Any] = []
        self._numbered: dict[
            int, tuple[int, Any]
        ] = {}  # by id, with the variable, so that no id is used again
        self.scheme_state = State()

    def choose_name(self) -> str:
        """Return the name, and choose it now if there is none; all ranks must do this in the same order."""
        if not self.name:
            self.name = f"{self._options.name}.{next(_numbers)}"
        return self.name

    @property
    def facts(self) -> dict[str, str]:
        """Describe how gradients are reduced: a state of one scheme means nothing to another."""
        return {"scheme": repr(self._options.scheme), "op": self._options.op.name.lower()}

    def number(self, variables: Sequence[Any]) -> None:
        """Number variables whose gradients will be reduced, in an order that is the same on all ranks.

        What a scheme remembers of a variable is stored under its number. Others are numbered at first use.
        """
        for variable in variables:
            self._numbered.setdefault(id(variable), (len(self._numbered), variable))

    def keep_local(self, variable: Any) -> None:
        """Keep the gradients of a variable on their rank, so that each rank trains it separately."""
        if not any(variable is local for local in self._local):
            self._local.append(variable)
            registry.note_local(variable)

    def is_local(self, variable: Any) -> bool:
        """Return whether each rank trains a variable separately."""
        return any(variable is local for local in self._local)

    def __call__(
        self, gradients: Sequence[Gradient], variables: Sequence[Variable], state: Sequence[Variable]
    ) -> list[Gradient]:
        """Reduce one step's gradients, in a graph or eagerly.

        Args:
            gradients: Dense tensors or sparse gradients, one for each of `variables`.
            variables: The variables about to be updated; all ranks pass the same, in the same order.
            state: The optimizer's own variables, which must be equal on all ranks like the weights.

        Returns:
            A list like `gradients`, the same on all ranks except for local variables.

        Raises:
            MismatchError: On every rank, if the ranks do not have the same variables. Inside a graph it is
                raised as TensorFlow's InvalidArgumentError with the same text.
        """
        if self._engine.size == 1:
            return [self._dense_if_asked(gradient) for gradient in gradients]
        shared = [index for index, variable in enumerate(variables) if not self.is_local(variable)]
        trained = [variables[index] for index in shared]
        registry.note_averaged(self._engine, self._bridge.readable(trained))
        reduced = self._reduced(
            [self._dense_if_asked(gradients[index]) for index in shared],
            trained,
            [] if self._local else state,
        )
        result = [self._scaled_local(gradient) for gradient in gradients]
        for index, gradient in zip(shared, reduced, strict=True):
            result[index] = gradient
        return result

    def _reduced(
        self, gradients: Sequence[Gradient], variables: Sequence[Variable], state: Sequence[Variable]
    ) -> list[Gradient]:
        """Compress the gradients, exchange them, verify the result, and decompress it."""
        bridge, compression = self._bridge, self._options.compressor
        compressed, contexts = [], []
        for gradient in gradients:
            small, context = (
                (gradient, None) if bridge.is_sparse(gradient) else compression.compress(gradient)
            )
            compressed.append(small)
            contexts.append(context)
        # The verification of this trace: the attribute may have changed when the graph runs.
        verification = self.verification
        reduced, exchanged = self._exchanged(compressed, variables, verification)
        if not verification.never:
            unrecorded = [
                gradient for gradient in compressed if bridge.is_sparse(gradient) or not exchanged.recorded
            ]
            checked = self._checked(verification, exchanged.due, unrecorded, reduced, variables, state)
            reduced = bridge.after(checked, reduced)  # a wrong gradient must not reach the weights
        return [
            gradient if bridge.is_sparse(gradient) else compression.decompress(gradient, context)
            for gradient, context in zip(reduced, contexts, strict=True)
        ]

    def _exchanged(
        self, gradients: Sequence[Gradient], variables: Sequence[Variable], verification: Verification
    ) -> tuple[list[Gradient], Exchanged]:
        """Exchange gradients; return those of all ranks, in the same order."""
        bridge = self._bridge
        before, after, op = self._factors()
        sparse = [gradient for gradient in gradients if bridge.is_sparse(gradient)]
        dense = [index for index, gradient in enumerate(gradients) if not bridge.is_sparse(gradient)]
        if dense:
            self._options.scheme.check([tuple(variables[index].shape) for index in dense])
        exchange = Exchange(
            self._engine,
            op,
            self._call(gradients, variables),
            verification,
            before,
            self._options.scheme,
            [self._key(variables[index]) for index in dense],
            self.scheme_state,
        )
        exchanged = bridge.exchange(
            exchange,
            [bridge.scaled(gradients[index], before) for index in dense],
            [part for gradient in sparse for part in self._rows(gradient)],
            groups_of([variables[index] for index in dense], self._options.groups),
            (self._options.device_dense, self._options.device_sparse),
        )
        dense_left, rows_left = iter(exchanged.dense), iter(exchanged.rows)
        reduced = []
        for gradient in gradients:
            if bridge.is_sparse(gradient):
                reduced.append(bridge.with_rows(gradient, next(rows_left), next(rows_left)))
            else:
                reduced.append(bridge.scaled(next(dense_left), after))
        return reduced, exchanged

    def _checked(
        self,
        verification: Verification,
        due: Tensor,
        unrecorded: Sequence[Gradient],
        applied: Sequence[Gradient],
        variables: Sequence[Variable],
        state: Sequence[Variable],
    ) -> Tensor:
        """Verify a step that is due, and return a tensor that exists once this is done."""
        bridge = self._bridge
        dense = [not bridge.is_sparse(gradient) for gradient in applied]
        parts = [len(bridge.parts(gradient)) for gradient in (*unrecorded, *applied)]
        compare = verification.comparison(variables, state, dense, parts)
        return bridge.check(self._engine, due, compare, [*variables, *state], [*unrecorded, *applied])

    def _factors(self) -> tuple[float, float, Op]:
        """Return the factors before and after gradients are combined, and the operation that combines them."""
        factor = self._options.predivide_factor
        if factor == 1.0:
            return 1.0, 1.0, self._options.op
        return 1.0 / factor, factor / self._engine.size, Op.SUM

    def _key(self, variable: Any) -> str:
        """Return the name under which a scheme stores what it remembers of a variable."""
        name = compared_name(variable_name(variable))
        if not hasattr(variable, "assign"):  # a tensor, which is another object in each step
            return name
        self.number([variable])
        number, _ = self._numbered[id(variable)]
        return f"{number}/{name}"

    def _rows(self, gradient: Gradient) -> tuple[Tensor, Tensor]:
        """Return values and indices of a sparse gradient; joining sums rows, so for a mean they are divided."""
        values, indices = self._bridge.parts(gradient)
        if self._options.op is Op.ADASUM:
            raise NotImplementedError(
                "Adasum needs the whole gradient, and that of an embedding is sparse. Pass sparse_as_dense=True."
            )
        return values / self._engine.size if self._options.op is Op.AVERAGE else values, indices

    def _scaled_local(self, gradient: Gradient) -> Gradient:
        factor = 1.0 / self._engine.size if self._options.scale_local else 1.0
        return self._bridge.scaled(gradient, factor)

    def _dense_if_asked(self, gradient: Gradient) -> Gradient:
        return self._bridge.to_dense(gradient) if self._options.sparse_as_dense else gradient

    def _call(self, gradients: Sequence[Gradient], variables: Sequence[Variable]) -> Call:
        self.choose_name()
        scheme = self._options.scheme
        dense = "" if isinstance(scheme, Plain) else f", {scheme!r}"
        details = []
        for gradient, variable in zip(gradients, variables, strict=True):
            kind = ", sparse" if self._bridge.is_sparse(gradient) else dense
            details.append(f"{self._bridge.dtype_name(gradient)}{list(variable.shape)}{kind}")
        return described_call(self.name, variables, details)
