"""Judge one step's gradients by their projections, and say what that has proved."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

# A gradient is compared only if rounding may change it by less than this part of its magnitude.
_COARSEST = 0.1


@dataclass(frozen=True)
class Proof:
    """What the gradients about to be applied are, beside what they should be; one entry a variable.

    Args:
        expected: Projections of what should be applied.
        have: Projections of what is about to be applied.
        scale: Sums of magnitudes, combined over the ranks as the gradients are.
        precision: Distance from 1 to the next number of the dtype in which a gradient travels.
        smallest: Below what sum of magnitudes that dtype rounds coarsely, or to zero.
        dtypes: Names of these dtypes.
        ranks: Number of ranks.
    """

    expected: np.ndarray
    have: np.ndarray
    scale: np.ndarray
    precision: np.ndarray
    smallest: np.ndarray
    dtypes: tuple[str, ...]
    ranks: int

    @cached_property
    def finite(self) -> np.ndarray:
        """Whether a gradient is finite; one that overflows is left to the loss scale or the user's callbacks."""
        return np.isfinite(self.expected)

    @cached_property
    def distance(self) -> np.ndarray:
        """How far what is applied is from what should be."""
        return np.where(self.finite, np.abs(self.have - self.expected), 0.0)

    @cached_property
    def allowed(self) -> np.ndarray:
        """How far rounding may take it."""
        return 8 * np.sqrt(self.ranks) * self.precision * self.scale + self.smallest

    @cached_property
    def compared(self) -> np.ndarray:
        """Whether the comparison means anything: the gradient is finite, and larger than its rounding."""
        return self.finite & (self.allowed <= _COARSEST * self.scale) & (self.scale > 0)

    def wrong(self) -> np.ndarray:
        """Return the indices of gradients that are not what they should be."""
        return np.flatnonzero(~(self.distance <= self.allowed) & self.finite)

    def sentence(self, combined: str) -> str:
        """Say what was compared and with what result.

        Args:
            combined: How gradients are combined: "average".
        """
        if not self.compared.any():
            return (
                f". The gradients {self._left_out(len(self.compared))}, so nothing is proved of their {combined} "
                "yet; the next steps are verified as well."
            )
        narrow = sorted(
            {name for name, seen in zip(self.dtypes, self.compared, strict=True) if seen and "16" in name}
        )
        travelling = f", sent as {' and '.join(narrow)}" if narrow else ""
        rounding = (
            f", of which rounding to {narrow[0]} explains up to {self._largest(self.allowed):.1g}"
            if narrow
            else ""
        )
        rest = int((~self.compared).sum())
        left_out = f" The gradients of {rest} more {self._left_out(rest)}." if rest else ""
        return (
            f", and what is applied is the {combined} of all ranks' gradients{travelling} (relative deviation "
            f"{self._largest(self.distance):.1g}{rounding}).{left_out}"
        )

    def _largest(self, part: np.ndarray) -> float:
        """Return the largest part of a gradient's magnitude among the gradients that were compared."""
        return float(np.max(part[self.compared] / self.scale[self.compared]))

    def _left_out(self, count: int) -> str:
        """Say why gradients were not compared."""
        narrowest = self.dtypes[int(np.argmax(self.precision))]
        rounded = (
            f" as {narrowest}" if "16" in narrowest else ""
        )  # they may have been more before they were sent
        reasons = {
            f"are zero{rounded}": self.finite & (self.scale == 0),
            "are not finite": ~self.finite,
        }
        known = {words: int(which.sum()) for words, which in reasons.items() if which.any()}
        small = count - sum(known.values())
        if small:
            known[f"are too small for {narrowest}"] = small
        if len(known) == 1:
            return next(iter(known))
        return ", ".join(f"{words} ({number})" for words, number in known.items())
