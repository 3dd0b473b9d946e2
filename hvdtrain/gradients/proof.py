"""Compare the gradients of one step by their projections, and report the result."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

# A gradient is compared only if rounding may change it by less than this part of its magnitude.
_COARSEST = 0.1


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

    def sentence(self, combined: str) -> str:
        """Return the result of the comparison as the end of a sentence.

        Args:
            combined: How gradients are combined, such as "average".
        """
        if not self.compared.any():
            return (
                f". The gradients {self._exclusion(len(self.compared))}, so nothing is proved of their {combined} "
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
        rest = int((~self.compared).sum())
        left_out = f" The gradients of {rest} more {self._exclusion(rest)}." if rest else ""
        return (
            f", and what is applied is the {combined} of all ranks' gradients{sent_as} (relative deviation "
            f"{self._largest(self.distance):.1g}{rounding}).{left_out}"
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
