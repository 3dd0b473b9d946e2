"""Compare arrays over the ranks by a few numbers: checksums, and projections on fixed signs."""

import math
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Products with signs are summed in pieces, so that their float64 copy stays small.
_PIECE = 1 << 20
# A gradient is compared only if rounding may change it by less than this part of its magnitude.
_COARSEST = 0.1


def checksum(array: np.ndarray) -> int:
    """Return a checksum of an array's bytes, without a copy: the array may fill most of the memory."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def projected(values: np.ndarray, rows: np.ndarray | None = None) -> tuple[float, float]:
    """Project an array on fixed signs, one per row times one per column.

    Args:
        values: The array, or the values of a sparse gradient.
        rows: The rows to which the values belong; by default all rows in order.

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
        # Not with BLAS, which would start threads on cores that belong to other ranks.
        total += float(np.einsum("i,ij,j", of_rows[start : start + step], piece, of_columns))
        magnitude += float(np.abs(piece).sum())
    return total, magnitude


def _signs(numbers: np.ndarray) -> np.ndarray:
    """Return +1 or -1 for each number, the same on every rank (Knuth's multiplicative hash)."""
    mixed = numbers.astype(np.uint64) * np.uint64(2654435761) >> np.uint64(15)
    return 1.0 - 2.0 * (mixed & np.uint64(1)).astype(np.float64)


def smallest(dtype: np.dtype) -> float:
    """Return the magnitude below which a float dtype rounds coarsely or to zero."""
    if dtype.name == "bfloat16":
        return float(np.finfo(np.float32).tiny)
    limits = np.finfo(dtype)
    return float(limits.smallest_subnormal if dtype == np.float16 else limits.tiny)


def precision(dtype: np.dtype) -> float:
    """Return the distance from 1 to the next number of a float dtype, NumPy's or bfloat16."""
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


@dataclass(frozen=True)
class Proof:
    """The gradients about to be applied, compared with the expected ones; one entry per variable.

    Args:
        expected: Projections of the gradients that should be applied.
        applied: Projections of the gradients that are about to be applied.
        scale: Sums of magnitudes, combined over the ranks like the gradients.
        precision: Distance from 1 to the next number of the dtype in which a gradient is sent.
        smallest: Sum of magnitudes below which that dtype rounds coarsely, or to zero.
        dtypes: Names of these dtypes.
        ranks: Number of ranks.
    """

    expected: np.ndarray
    applied: np.ndarray
    scale: np.ndarray
    precision: np.ndarray
    smallest: np.ndarray
    dtypes: tuple[str, ...]
    ranks: int

    @cached_property
    def finite(self) -> np.ndarray:
        """Whether a gradient is finite; overflows are handled by the loss scale or by the user's callbacks."""
        return np.isfinite(self.expected)

    @cached_property
    def distance(self) -> np.ndarray:
        """Distance between the applied and the expected projection."""
        return np.where(self.finite, np.abs(self.applied - self.expected), 0.0)

    @cached_property
    def allowed(self) -> np.ndarray:
        """Largest distance that rounding may cause."""
        return 8 * np.sqrt(self.ranks) * self.precision * self.scale + self.smallest

    @cached_property
    def compared(self) -> np.ndarray:
        """Whether the comparison is meaningful: the gradient is finite, and larger than its rounding errors."""
        return self.finite & (self.allowed <= _COARSEST * self.scale) & (self.scale > 0)

    def wrong(self) -> np.ndarray:
        """Return the indices of wrong gradients."""
        return np.flatnonzero(~(self.distance <= self.allowed) & self.finite)

    def sentence(self, combined: str, with_errors: bool = False, subject: str = "gradients") -> str:
        """Return the result of the comparison as the end of a sentence.

        Args:
            combined: How gradients are combined, such as "average".
            with_errors: Whether the expected gradients are those without what the ranks leave to later steps.
            subject: What was combined.
        """
        if not self.compared.any():
            return (
                f". The {subject} {self._exclusion(len(self.compared))}, so nothing is proved of their {combined} "
                "yet; the next steps are verified as well."
            )
        narrow = sorted(
            {name for name, seen in zip(self.dtypes, self.compared, strict=True) if seen and "16" in name}
        )
        sent_as = f", sent as {' and '.join(narrow)}" if narrow else ""
        rounding = (
            f", of which rounding to {narrow[0]} explains up to {self._largest(self.allowed):.1g}"
            if narrow
            else ""
        )
        left_to_later = ", with what is left to later steps," if with_errors else ""
        rest = int((~self.compared).sum())
        left_out = f" The {subject} of {rest} more {self._exclusion(rest)}." if rest else ""
        return (
            f", and what is applied{left_to_later} is the {combined} of all ranks' {subject}{sent_as} (relative "
            f"deviation {self._largest(self.distance):.1g}{rounding}).{left_out}"
        )

    def _largest(self, part: np.ndarray) -> float:
        """Return the largest ratio of `part` to the magnitude, among the gradients that were compared."""
        return float(np.max(part[self.compared] / self.scale[self.compared]))

    def _exclusion(self, count: int) -> str:
        """Return as text why gradients were not compared."""
        narrowest = self.dtypes[int(np.argmax(self.precision))]
        rounded = (
            f" as {narrowest}" if "16" in narrowest else ""
        )  # they may have been nonzero before they were sent
        reasons = {
            f"are zero{rounded}": self.finite & (self.scale == 0),
            "are not finite": ~self.finite,
        }
        counts = {reason: int(mask.sum()) for reason, mask in reasons.items() if mask.any()}
        small = count - sum(counts.values())
        if small:
            counts[f"are too small for {narrowest}"] = small
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{reason} ({number})" for reason, number in counts.items())
