"""The proof at the first step: all ranks hold the same weights, and what is applied is everybody's mean.

It lives here and not with the diagnoses because it stands in the way of every gradient.
"""

import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.collectives import tensors
from hvdtrain.collectives.base import Engine, MismatchError, Op, ranks_text
from hvdtrain.gradients.naming import variable_name

# Products with signs are summed in pieces, so that their float64 copy stays small.
_PIECE = 1 << 20


@dataclass(frozen=True)
class Policy:
    """When a step is verified: the first only, every N-th, or never.

    Args:
        every: Distance between two verified steps; None for one step only, 0 for never.
        first: The first verified step, counted from 0.
        strict: Whether ranks that differ are refused, or only reported.
    """

    every: int | None = None
    first: int = 0
    strict: bool = True

    @classmethod
    def from_environment(cls) -> "Policy":
        """Reads HVDTRAIN_VERIFY=off|first|second|every:N.

        Raises:
            ValueError: If it is set to anything else.
        """
        text = os.environ.get("HVDTRAIN_VERIFY", "first").lower()
        if text in ("first", ""):
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
        """Tells whether a step, counted from 0, is verified."""
        later = step - self.first
        return later >= 0 and (later % self.every == 0 if self.every else later == 0) and not self.never

    @property
    def never(self) -> bool:
        """True if no step is verified."""
        return self.every == 0


class Verification:
    """Compares weights over the ranks, and the applied gradient with an independent account of the mean.

    Each rank projects its own gradient on fixed signs, in float64: a few numbers a variable. The mean of
    the ranks' projections must be the projection of what is applied. This costs one pass over the
    gradients and does not grow with the number of ranks.

    Args:
        engine: The engine whose work is checked.
        op: How gradients are combined.
        policy: Which steps are checked.
    """

    def __init__(self, engine: Engine, op: Op, policy: Policy) -> None:
        self._engine = engine
        self._op = op
        self._policy = policy
        self._step = 0
        self._due = False
        self._seen: dict[int, tuple[float, ...]] = {}
        self._announced = False

    def begin(self) -> bool:
        """Counts a step.

        Returns:
            Whether it is verified.
        """
        self._step += 1
        self._due = self._policy.is_due(self._step - 1)
        self._seen = {}
        return self._due

    def see(self, place: int, gradient: np.ndarray, factor: float) -> None:
        """Keeps account of a gradient before it changes where it lies.

        Args:
            place: Its place among the dense gradients.
            gradient: What is about to be sent.
            factor: By what it has been multiplied.
        """
        if self._due and self._op is not Op.ADASUM:
            self._seen[place] = tuple(part / factor for part in _projected(gradient))

    def check(
        self,
        due: Any,
        unseen: Sequence[Any],
        applied: Sequence[Any],
        variables: Sequence[Any],
        state: Sequence[Any],
    ) -> Any:
        """Checks this step if its turn has come, inside a graph each time the graph runs.

        Args:
            due: What `begin` said, as a bool tensor.
            unseen: This rank's gradients of which `see` has taken no account, in order; sparse ones as
                `tf.IndexedSlices`.
            applied: The gradients about to be applied.
            variables: The weights about to be updated.
            state: The optimizer's variables.

        Returns:
            Something to depend on before the gradients are used, or None if there is nothing to wait for.
        """
        if self._policy.never:
            return None
        return tf.cond(due, lambda: self._check(unseen, applied, variables, state), lambda: tf.constant(True))

    def _check(
        self, unseen: Sequence[Any], applied: Sequence[Any], variables: Sequence[Any], state: Sequence[Any]
    ) -> Any:
        trained = [variable_name(each) for each in variables]
        stored = trained + [variable_name(each) for each in state]
        weights = [tf.convert_to_tensor(each) for each in (*variables, *state)]
        dense = [not isinstance(each, tf.IndexedSlices) for each in applied]
        gradients = [part for each in (*unseen, *applied) for part in _parts(each)]
        parts = [len(_parts(each)) for each in (*unseen, *applied)]

        def compare(*arrays: np.ndarray) -> list[np.ndarray]:
            if not self._same_weights(stored, arrays[: len(stored)]):
                return [np.array(False)]
            ends = len(stored) + np.cumsum(parts)
            pairs = [arrays[end - count : end] for end, count in zip(ends, parts, strict=True)]
            deviation = None
            if self._op is not Op.ADASUM:  # no sum of projections tells what angles have made of it
                ours = self._accounts(dense, pairs[: len(unseen)])
                deviation = self._compare_gradients(trained, ours, pairs[len(unseen) :])
            self._announce(self._step, len(trained), deviation)
            return [np.array(True)]

        (checked,) = tensors.on_host(self._engine, compare, [*weights, *gradients], [tf.bool])
        checked.set_shape(())
        return checked

    def _accounts(self, dense: Sequence[bool], unseen: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """Puts the accounts taken before sending and those of the rest into the order of the variables."""
        seen = iter([account for _, account in sorted(self._seen.items())])
        rest = iter([_projected(*parts) for parts in unseen])
        return np.array([next(seen) if each and self._seen else next(rest) for each in dense])

    def _same_weights(self, names: Sequence[str], arrays: Sequence[np.ndarray]) -> bool:
        try:
            self._compare_weights(names, arrays)
        except MismatchError as error:
            if self._policy.strict:
                raise
            self._engine.say(f"warning: {error}")
            return False
        return True

    def _compare_weights(self, names: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
        mine = np.array([[_checksum(each) for each in arrays]], np.int64)
        every = self._engine.allgather(mine)
        wrong = np.argwhere((every != every[0]).any(axis=0)).reshape(-1)
        if len(wrong):
            first = wrong[0]
            ranks = self._engine.ranks
            others = ranks_text([ranks[row] for row in np.flatnonzero(every[:, first] != every[0, first])])
            raise MismatchError(
                f"The ranks do not hold the same weights: {names[first]} differs from rank {ranks[0]} on {others}"
                f"{f', and so do {len(wrong) - 1} further variables' if len(wrong) > 1 else ''}. "
                "Expected: the same values on all ranks before an update. Give model.fit the callback "
                "hvd.callbacks.BroadcastGlobalVariablesCallback(0); in a loop of your own call "
                "hvd.broadcast_variables(model.weights, root_rank=0) before the first step. If they were "
                "equal and have drifted, something changes weights on some ranks only."
            )

    def _compare_gradients(
        self,
        names: Sequence[str],
        ours: np.ndarray,
        applied: Sequence[Sequence[np.ndarray]],
    ) -> float:
        expected, scale = self._engine.allreduce(ours, self._op).T
        have = np.array([_projected(*parts)[0] for parts in applied])
        precision = np.array([_precision(parts[0].dtype) for parts in applied])
        smallest = np.array([parts[0].size * _smallest(parts[0].dtype) for parts in applied])
        # An overflow is not an error of ours: the loss scale or the user's callbacks deal with it.
        distance = np.where(np.isfinite(expected), np.abs(have - expected), 0.0)
        allowed = 8 * np.sqrt(self._engine.size) * precision * scale + smallest
        wrong = np.flatnonzero(~(distance <= allowed) & np.isfinite(expected))
        mine = (
            self._wrong_gradient(names[wrong[0]], have[wrong[0]], expected[wrong[0]]) if len(wrong) else None
        )
        told = [text for text in self._engine.allgather_object(mine) if text]
        if told:
            raise MismatchError(told[0])
        return float(np.max(np.divide(distance, scale, out=np.zeros_like(scale), where=scale > 0), initial=0))

    def _wrong_gradient(self, name: str, have: float, expected: float) -> str:
        return (
            f"Rank {self._engine.ranks[self._engine.rank]}: the gradient about to be applied to {name} is not the "
            f"{self._op.name.lower()} of the {self._engine.size} ranks' gradients: its projection on fixed "
            f"signs is {have:.9g}, expected {expected:.9g}. Nothing was applied. The error is in the "
            f"{self._engine.name} engine or in the MPI beneath it ({self._engine.library}): try another "
            "HVDTRAIN_ENGINE, run `hvdtrain doctor`, and report it."
        )

    def _announce(self, step: int, variables: int, deviation: float | None) -> None:
        applied = ""
        if deviation is not None:
            applied = (
                f", and what is applied is the {self._op.name.lower()} of all ranks' gradients (relative "
                f"deviation {deviation:.1g})"
            )
        if not self._announced:
            self._engine.say(
                f"verified at step {step}: {variables} variables are the same on all {self._engine.size} ranks"
                f"{applied}."
            )
        self._announced = True


def _checksum(array: np.ndarray) -> int:
    """Returns a number of an array's bytes, of which no copy is made: they may be much of what memory there is."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _parts(gradient: Any) -> list[Any]:
    """Takes a gradient apart into tensors: a sparse one into its values and the rows they belong to."""
    return [gradient.values, gradient.indices] if isinstance(gradient, tf.IndexedSlices) else [gradient]


def _projected(values: np.ndarray, rows: np.ndarray | None = None) -> tuple[float, float]:
    """Projects an array on fixed signs, one a row times one a column.

    Args:
        values: The array, or the values of a sparse gradient.
        rows: Which rows the values belong to, if not all in order.

    Returns:
        The projection and the sum of magnitudes, in float64.
    """
    table = values.reshape(len(values), math.prod(values.shape[1:])) if values.ndim else values.reshape(1, 1)
    of_columns = _signs(np.arange(table.shape[1]))
    of_rows = _signs(np.arange(len(table)) if rows is None else rows)
    total = magnitude = 0.0
    step = max(_PIECE // max(table.shape[1], 1), 1)
    for start in range(0, len(table), step):
        piece = table[start : start + step].astype(np.float64)
        # Not by BLAS, which would start threads on cores that belong to other ranks.
        total += float(np.einsum("i,ij,j", of_rows[start : start + step], piece, of_columns))
        magnitude += float(np.abs(piece).sum())
    return total, magnitude


def _signs(numbers: np.ndarray) -> np.ndarray:
    """Draws +1 or -1 for each number, the same on every rank (Knuth's multiplicative hash)."""
    mixed = numbers.astype(np.uint64) * np.uint64(2654435761) >> np.uint64(15)
    return 1.0 - 2.0 * (mixed & np.uint64(1)).astype(np.float64)


def _smallest(dtype: np.dtype) -> float:
    """Returns below what magnitude a float dtype rounds coarsely or to zero."""
    if dtype.name == "bfloat16":
        return float(np.finfo(np.float32).tiny)
    limits = np.finfo(dtype)
    return float(limits.smallest_subnormal if dtype == np.float16 else limits.tiny)


def _precision(dtype: np.dtype) -> float:
    """Returns the distance from 1 to the next number of a float dtype, NumPy's or bfloat16."""
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)
