"""Choose the settings that are faster by more than noise and that slow down no kind of work."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.bench.report import Spread
from hvdtrain.launch.tuned_settings import Knob

MIN_GAIN = 1.02  # a setting must be this many times as fast, in the median of all rounds
MIN_WORST = 0.95  # and at least this many times as fast in every kind of work

Times = Mapping[str, Sequence[float]]  # seconds by kind of work, in the order of the rounds


@dataclass(frozen=True)
class KnobResult:
    """Result of trying one setting.

    Args:
        knob: The setting.
        gain: Speed-up of all work: the geometric mean over the kinds of work, by round.
        worst: Speed-up of the kind of work that gains least, in the median of all rounds.
    """

    knob: Knob
    gain: Spread
    worst: float

    @property
    def helps(self) -> bool:
        """Whether the setting is faster by more than noise and slows down no kind of work."""
        return self.gain.median >= MIN_GAIN and self.gain.low > 1.0 and self.worst >= MIN_WORST


def gain(before: Times, after: Times) -> tuple[Spread, float]:
    """Compare two contenders of the same rounds.

    Args:
        before: The times of the first contender.
        after: The times of the second contender.

    Returns:
        The speed-up of the second contender over all work, and for the kind of work that gains least.
    """
    ratios = {}
    for work, times in before.items():
        ratios[work] = [old / new for old, new in zip(times, after[work], strict=False)]
    means = []
    for ratios_of_round in zip(*ratios.values(), strict=False):
        means.append(math.exp(statistics.fmean(math.log(ratio) for ratio in ratios_of_round)))
    return Spread.of(means), min(statistics.median(values) for values in ratios.values())


def best(results: Iterable[KnobResult]) -> list[KnobResult]:
    """Return for each choice the setting that helps most, if any helps."""
    found: dict[str, KnobResult] = {}
    for result in results:
        other = found.get(result.knob.choice)
        if result.helps and (other is None or result.gain.median > other.gain.median):
            found[result.knob.choice] = result
    return list(found.values())
