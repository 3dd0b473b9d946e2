"""Verify a step: all ranks have the same weights, and the applied gradient is the mean of all ranks' gradients."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdtrain import settings
from hvdtrain.collectives.engine import Engine, MismatchError, ranks_text
from hvdtrain.gradients.naming import variable_name
from hvdtrain.gradients.options import ReduceOptions
from hvdtrain.gradients.projections import Proof, checksum, precision, projected, smallest
from hvdtrain.gradients.schemes import Plain
from hvdtrain.gradients.trained_variables import registry


@dataclass(frozen=True)
class Policy:
    """Which steps are verified: the first only, every N-th, or none.

    Args:
        every: Distance between two verified steps; None for one step only, 0 for no step.
        first: The first verified step, counted from 0.
        strict: Whether different weights are an error, or only reported.
        again: Whether steps 10, 100, 1000 and so on are verified too; there different weights are an error.
    """

    every: int | None = None
    first: int = 0
    strict: bool = True
    again: bool = False

    @classmethod
    def from_environment(cls) -> "Policy":
        """Read HVDTRAIN_VERIFY=off|first|second|every:N.

        Raises:
            ValueError: If it is set to anything else.
        """
        text = settings.get("HVDTRAIN_VERIFY").lower()
        if text == "first":
            return cls()
        if text == "second":
            return cls(first=1)
        if text == "off":
            return cls(0)
        every = re.fullmatch(r"every:([1-9]\d*)", text)
        if not every:
            raise ValueError(
                f"HVDTRAIN_VERIFY must be off, first, second or every:N with N of at least 1. Received: {text!r}."
            )
        return cls(int(every.group(1)))

    def is_due(self, step: int) -> bool:
        """Return whether a step, counted from 0, is verified."""
        if self.never:
            return False
        later = step - self.first
        chosen = later >= 0 and (later % self.every == 0 if self.every else later == 0)
        return chosen or self._again(step)

    def is_strict(self, step: int) -> bool:
        """Return whether different weights are an error at a step, counted from 0."""
        return self.strict or (self.again and step >= 9)

    def _again(self, step: int) -> bool:
        return self.again and re.fullmatch("10+", str(step + 1)) is not None

    @property
    def never(self) -> bool:
        """True if no step is verified."""
        return self.every == 0


class Verification:
    """A comparison of weights over the ranks, and of the applied gradient with an independent result for the mean.

    Each rank projects its own gradient on fixed signs, in float64: a few numbers per variable. The mean of
    the ranks' projections must be the projection of the applied gradient. This costs one pass over the
    gradients and does not grow with the number of ranks.

    Args:
        engine: The engine whose results are checked.
        options: How gradients are combined.
        policy: Which steps are checked.
    """

    def __init__(self, engine: Engine, options: ReduceOptions, policy: Policy) -> None:
        self._engine = engine
        self._op, self._scheme, self._subject = options.op, options.scheme, options.subject
        self._is_exact = options.is_exact
        self._policy = policy
        self._step = 0
        self._due = False
        self._recorded: dict[int, tuple[float, float]] = {}
        self._announced = ""
        self._unproved = False  # True while no gradient could be compared

    def begin(self) -> bool:
        """Count a step.

        Returns:
            Whether it is verified.
        """
        self._step += 1
        self._due = self._policy.is_due(self._step - 1) or self._unproved
        self._recorded = {}
        return self._due

    def record(self, place: int, gradient: np.ndarray, factor: float) -> None:
        """Record the projection of a gradient, which is then reduced in place, or add that of a part of it.

        Args:
            place: Its index among the dense gradients.
            gradient: The gradient about to be sent; or what earlier steps have left out and this one sends; or,
                with a negative factor, what this step leaves out.
            factor: The gradient has been multiplied by this.
        """
        if self._due and self._is_exact:
            projection, magnitude = projected(gradient)
            before, magnitude_before = self._recorded.get(place, (0.0, 0.0))
            self._recorded[place] = before + projection / factor, magnitude_before + magnitude / abs(factor)

    @property
    def never(self) -> bool:
        """True if no step is verified."""
        return self._policy.never

    def comparison(
        self, variables: Sequence[Any], state: Sequence[Any], dense: Sequence[bool], parts: Sequence[int]
    ) -> Callable[..., list[np.ndarray]]:
        """Return the function that verifies a step, to be called on the host.

        Args:
            variables: The weights about to be updated.
            state: The optimizer's variables.
            dense: Whether the gradient of each of `variables` is dense.
            parts: Number of arrays of each gradient: first the gradients that were not passed to `record`, then the
                gradients about to be applied.

        Returns:
            A function of the arrays of `variables` and `state`, and of all parts of these gradients. It returns an
            array of one bool: whether the ranks have the same weights. It raises MismatchError on every rank if
            they do not and the policy is strict, or if a gradient is wrong.
        """
        trained = [variable_name(variable) for variable in variables]
        stored = trained + [variable_name(variable) for variable in state]
        unrecorded = len(parts) - len(dense)

        def compare(*arrays: np.ndarray) -> list[np.ndarray]:
            if not self._same_weights(stored, arrays[: len(stored)]):
                return [np.array(False)]
            registry.note_verified(variables)
            ends = len(stored) + np.cumsum(parts)
            gradients = [arrays[end - count : end] for end, count in zip(ends, parts, strict=True)]
            proof = None
            if not isinstance(self._scheme, Plain):
                self._compare_applied(trained, gradients[unrecorded:])
            if self._is_exact:
                own = self._projections(dense, gradients[:unrecorded])
                proof = self._compare_gradients(trained, own, gradients[unrecorded:])
            self._announce(self._step, len(trained), proof)
            return [np.array(True)]

        return compare

    def _projections(self, dense: Sequence[bool], unrecorded: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """Return the projections of this rank's gradients in the order of the variables."""
        recorded = iter([self._recorded[place] for place in sorted(self._recorded)])
        rest = iter([projected(*parts) for parts in unrecorded])
        return np.array([next(recorded) if is_dense and self._recorded else next(rest) for is_dense in dense])

    def _same_weights(self, names: Sequence[str], arrays: Sequence[np.ndarray]) -> bool:
        try:
            self._compare_weights(names, arrays)
        except MismatchError as error:
            if self._policy.is_strict(self._step - 1):
                raise
            self._engine.warn(str(error))
            return False
        return True

    def _compare_weights(self, names: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
        if different := self._different(names, arrays):
            raise MismatchError(
                f"The ranks do not hold the same weights: {different}. "
                "Expected: the same values on all ranks before an update. Give model.fit the callback "
                "hvd.callbacks.BroadcastGlobalVariablesCallback(0); in a loop of your own call "
                "hvd.broadcast_variables(model.weights, root_rank=0) before the first step. If they were "
                "equal and have drifted, something changes weights on some ranks only."
            )

    def _compare_applied(self, names: Sequence[str], applied: Sequence[Sequence[np.ndarray]]) -> None:
        if different := self._different(names, [parts[0] for parts in applied]):
            raise MismatchError(
                f"The ranks are about to apply different gradients: that of {different}. Nothing was applied. "
                f"Expected: {self._scheme!r} returns the same arrays on all ranks."
            )

    def _different(self, names: Sequence[str], arrays: Sequence[np.ndarray]) -> str:
        """Compare arrays over the ranks; return the first name and the ranks that differ, or an empty text."""
        own = np.array([[checksum(array) for array in arrays]], np.int64)
        checksums = self._engine.allgather(own)
        wrong = np.argwhere((checksums != checksums[0]).any(axis=0)).reshape(-1)
        if not len(wrong):
            return ""
        first, ranks = wrong[0], self._engine.ranks
        others = ranks_text(
            [ranks[row] for row in np.flatnonzero(checksums[:, first] != checksums[0, first])]
        )
        more = f", and so do {len(wrong) - 1} further variables" if len(wrong) > 1 else ""
        return f"{names[first]} differs from rank {ranks[0]} on {others}{more}"

    def _compare_gradients(
        self, names: Sequence[str], own: np.ndarray, applied: Sequence[Sequence[np.ndarray]]
    ) -> Proof:
        expected, scale = self._engine.allreduce(own, self._op).T
        dtypes = [parts[0].dtype for parts in applied]
        proof = Proof(
            expected,
            np.array([projected(*parts)[0] for parts in applied]),
            scale,
            np.array([precision(dtype) for dtype in dtypes]),
            np.array([parts[0].size * smallest(dtype) for parts, dtype in zip(applied, dtypes, strict=True)]),
            tuple(dtype.name for dtype in dtypes),
            self._engine.size,
        )
        wrong = proof.wrong()[:1]
        own_errors = [
            self._wrong_gradient(names[index], proof.applied[index], expected[index]) for index in wrong
        ]
        # A rank that has joined sends None.
        errors = [text for texts in self._engine.allgather_object(own_errors) for text in texts or ()]
        if errors:
            raise MismatchError(errors[0])
        return proof

    def _wrong_gradient(self, name: str, have: float, expected: float) -> str:
        return (
            f"Rank {self._engine.ranks[self._engine.rank]}: the gradient about to be applied to {name} is not the "
            f"{self._op.name.lower()} of the {self._engine.size} ranks' gradients: its projection on fixed "
            f"signs is {have:.9g}, expected {expected:.9g}. Nothing was applied. {self._suspect}"
        )

    @property
    def _suspect(self) -> str:
        if not isinstance(self._scheme, Plain):
            return (
                f"{self._scheme!r} must return, as the errors of its result, all that is not in its arrays, and "
                "nothing else."
            )
        return (
            f"The error is in the {self._engine.name} engine or in the MPI beneath it ({self._engine.library}): "
            "try another HVDTRAIN_ENGINE, run `hvdtrain doctor`, and report it."
        )

    def _announce(self, step: int, variables: int, proof: Proof | None) -> None:
        """Report the result: once, and once before if no gradient could be compared."""
        self._unproved = proof is not None and not proof.compared.any()
        announced = "nothing" if self._unproved else "all"
        if self._announced in ("all", announced):
            return
        self._announced = announced
        combined = self._op.name.lower()
        if proof:
            applied = proof.sentence(combined, not isinstance(self._scheme, Plain), self._subject)
        elif isinstance(self._scheme, Plain):
            applied = "."
        else:
            applied = (
                f", and so are the applied {self._subject}. {self._scheme!r} drops parts of them, so "
                f"they are not proved to be the {combined} of all ranks' {self._subject}."
            )
        moment = "step" if self._subject == "gradients" else "average"
        self._engine.say(
            f"verified at {moment} {step}: {variables} variables are the same on all {self._engine.size} ranks"
            f"{applied}"
        )
