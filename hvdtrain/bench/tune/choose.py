"""From times to a choice: what is faster by more than noise, and slower in nothing."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.bench.report import Spread
from hvdtrain.launch.tunable_settings import Knob

WORTH = 1.02  # times as fast, in the middle of all rounds, is worth a setting
HARM = 0.95  # times as fast in any one piece of work is not made up for by another

Times = Mapping[str, Sequence[float]]  # by piece of work, in the order of the rounds


@dataclass(frozen=True)
class Tried:
    """What came of trying one knob.

    Args:
        knob: Which.
        gain: How many times as fast everything together was: a geometric mean over the pieces of work, by round.
        worst: The same of the piece of work that it did the least for, in the middle of all rounds.
    """

    knob: Knob
    gain: Spread
    worst: float

    @property
    def helps(self) -> bool:
        """Tells whether it is faster by more than noise, and slower in nothing."""
        return self.gain.median >= WORTH and self.gain.low > 1.0 and self.worst >= HARM


def gain(before: Times, after: Times) -> tuple[Spread, float]:
    """Compares two contenders of the same rounds.

    Args:
        before: The times of one.
        after: Those of the other.

    Returns:
        How many times as fast the other is in everything together, and in the piece of work that is its worst.
    """
    ratios = {
        work: [one / other for one, other in zip(before[work], after[work], strict=False)] for work in before
    }
    rounds = zip(*ratios.values(), strict=False)
    together = [math.exp(statistics.fmean(math.log(each) for each in row)) for row in rounds]
    return Spread.of(together), min(statistics.median(each) for each in ratios.values())


def best(tried: Iterable[Tried]) -> list[Tried]:
    """Takes of each choice the knob that helps most, if any does."""
    found: dict[str, Tried] = {}
    for each in tried:
        other = found.get(each.knob.choice)
        if each.helps and (other is None or each.gain.median > other.gain.median):
            found[each.knob.choice] = each
    return list(found.values())
