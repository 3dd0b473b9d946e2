"""Combine schemes: add error feedback, or compress only some gradients or steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hvdtrain.collectives.engine import Engine
from hvdtrain.collectives.ops import Op, carrier
from hvdtrain.gradients.compression.checks import check_integer
from hvdtrain.gradients.compression.pieces import as_given
from hvdtrain.gradients.schemes import Group, Plain, Scheme, State


@dataclass(frozen=True)
class ErrorFeedback(Scheme):
    """Adds to each gradient what the other scheme has left out in earlier steps, so that it is applied later.

    With e the error of a rank, 0 at first, and g its gradient, g + e is given to the scheme, and what the scheme
    does not apply becomes the new e. The sum of all that is applied then differs from that of all gradients by
    the last errors only, and SGD converges as it does without compression (Karimireddy et al. 2019,
    arXiv:1901.09847).

    Args:
        scheme: The scheme that sends only a part.
    """

    scheme: Scheme
    is_exact = True

    def check(self, shapes: Sequence[tuple[int | None, ...]]) -> None:
        """Pass the shapes to the other scheme."""
        self.scheme.check(shapes)

    def reduce(self, group: Group, engine: Engine, state: State) -> Group:
        """Reduce gradients and errors together."""
        corrected = [
            _added(state.errors.get(key), array) for key, array in zip(group.keys, group.arrays, strict=True)
        ]
        given = replace(
            group,
            arrays=corrected,
            in_place=[True] * len(corrected),
            wants_errors=True,
        )
        result = self.scheme.reduce(given, engine, state)
        if len(result.errors) != len(corrected):
            raise TypeError(
                f"{self.scheme!r} does not return what it leaves out, which ErrorFeedback needs: pass it as "
                f"group.with_arrays(results, errors), one for each array. Received: {len(result.errors)} errors "
                f"for {len(corrected)} arrays."
            )
        for key, error in zip(group.keys, result.errors, strict=True):
            if error is None:
                state.errors.pop(key, None)
            else:
                state.errors[key] = _finite(error)
        return group.with_arrays(as_given(result.arrays, group))


@dataclass(frozen=True)
class Selective(Scheme):
    """Uses another scheme for large gradients of floats after the first steps; the others are sent as they are.

    Args:
        scheme: The other scheme.
        min_size: Number of elements from which a gradient is large.
        start_after: Number of steps in which all gradients are sent as they are.
    """

    scheme: Scheme
    min_size: int = 1024
    start_after: int = 0

    def __post_init__(self) -> None:
        check_integer("min_size", self.min_size, 0)
        check_integer("start_after", self.start_after, 0)

    @property
    def is_exact(self) -> bool:  # type: ignore[override]
        """Whether the other scheme is."""
        return self.scheme.is_exact

    def check(self, shapes: Sequence[tuple[int | None, ...]]) -> None:
        """Pass the shapes of large gradients to the other scheme."""
        if shapes:
            self.scheme.check(
                [shape for shape in shapes if None in shape or int(np.prod(shape)) >= self.min_size]  # type: ignore[arg-type]
            )

    def reduce(self, group: Group, engine: Engine, state: State) -> Group:
        """Reduce each gradient by the other scheme or by `Plain`."""
        # Counted for each gradient, because the groups may change.
        started = [
            self.start_after == 0 or state.count(f"steps/{key}") >= self.start_after for key in group.keys
        ]
        chosen = [
            begun and 0 < array.size >= self.min_size and _is_float(array)
            for begun, array in zip(started, group.arrays, strict=True)
        ]
        return reduce_some(self.scheme, chosen, group, engine, state)


def reduce_some(scheme: Scheme, chosen: Sequence[bool], group: Group, engine: Engine, state: State) -> Group:
    """Reduce the chosen arrays of a group by a scheme, and the others by `Plain`."""
    arrays: dict[int, np.ndarray] = {}
    errors: dict[int, np.ndarray | None] = {}
    call = group.call
    for reducing, wanted in ((Plain(), False), (scheme, True)):
        indices = [index for index, is_chosen in enumerate(chosen) if bool(is_chosen) is wanted]
        if indices:
            result = reducing.reduce(group.part(indices, call), engine, state)
            arrays.update(zip(indices, result.arrays, strict=True))
            errors.update(zip(indices, result.errors, strict=False))
            call = None
    return group.with_arrays(
        [arrays[index] for index in range(len(chosen))],
        [errors[index] for index in range(len(chosen))] if len(errors) == len(chosen) else (),
    )


def _added(error: np.ndarray | None, array: np.ndarray) -> np.ndarray:
    """Add a gradient to an error in place; return a copy of the gradient if there is none yet."""
    if error is None:
        return array.astype(carrier(array.dtype, Op.SUM))  # 16-bit floats would lose small errors
    error += array
    return error


def _finite(error: np.ndarray) -> np.ndarray:
    """Return an error with zeros for what is not finite, which would spoil all steps after an overflow."""
    with np.errstate(all="ignore"):
        spoiled = not np.isfinite(error.sum())
    return np.nan_to_num(error, copy=False, nan=0.0, posinf=0.0, neginf=0.0) if spoiled else error


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"
