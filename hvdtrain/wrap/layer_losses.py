"""Combine the losses that layers add for the rows of each rank into the losses of the whole batch.

Keras sums all values passed to `add_loss`. A scalar may be a mean over the rows, or a sum; a tensor may hold one
value for each row. `row_trial.py` tests the model on generated rows to find out which. If a loss is none of these,
every rank computes whole batches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain.patching import replace
from hvdtrain.wrap import context
from hvdtrain.wrap.row_shard import Share

# The name for a model output without rows, which is combined like a loss.
OUTPUT = "an output"


class Kind(Enum):
    """The relation between the loss of a batch and the losses of its parts."""

    ROWS = "one value for each row"
    MEAN = "a mean over rows"
    SUM = "a sum over rows"


@dataclass(frozen=True)
class Observation:
    """A loss of generated rows: computed from all rows, and from each part of them.

    Args:
        whole: The loss of all rows.
        parts: The losses of the parts.
        rows: Number of rows of each part.
    """

    whole: np.ndarray
    parts: Sequence[np.ndarray]
    rows: Sequence[int]


def kind_of(observations: Sequence[Observation], tolerance: float) -> Kind | None:
    """Return the kind of a loss; None if it is none of the kinds, or if the observations do not decide.

    Args:
        observations: The same loss for several sets of rows.
        tolerance: Allowed difference of sums in another order, relative to the largest number.
    """
    if all(_has_rows(observed) for observed in observations):
        joined = [_close(observed, np.concatenate(observed.parts), tolerance) for observed in observations]
        return Kind.ROWS if all(joined) else None
    if any(part.shape != observed.whole.shape for observed in observations for part in observed.parts):
        return None
    # A loss that is 0 in all observations, or never finite, fits both kinds and so decides nothing.
    finite = [observed for observed in observations if np.isfinite([observed.whole, *observed.parts]).all()]
    fitting = []
    for kind in (Kind.MEAN, Kind.SUM):
        if all(_close(observed, _expected(observed, kind), tolerance) for observed in finite):
            fitting.append(kind)
    return fitting[0] if len(fitting) == 1 else None


def _has_rows(observed: Observation) -> bool:
    counts = [len(part) if part.ndim else None for part in (observed.whole, *observed.parts)]
    return counts == [sum(observed.rows), *observed.rows]


def _expected(observed: Observation, kind: Kind) -> np.ndarray:
    shares = np.array(observed.rows) / (sum(observed.rows) if kind is Kind.MEAN else observed.rows)
    return np.tensordot(shares, np.stack(observed.parts), 1)


def _close(observed: Observation, expected: np.ndarray, tolerance: float) -> bool:
    largest = max(float(np.max(np.abs(part), initial=0)) for part in (observed.whole, *observed.parts))
    return bool(np.allclose(observed.whole, expected, rtol=0, atol=tolerance * largest, equal_nan=True))


class LossRecorder:
    """A list of the losses that layers add, which stay unchanged.

    Attributes:
        losses: Pairs of a layer name and a loss, in the order in which they were added.
    """

    def __init__(self) -> None:
        self.losses: list[tuple[str, Any]] = []

    def __call__(self, name: str, loss: Any) -> Any:
        """Record one loss and return it.

        Args:
            name: The name of the layer.
            loss: The loss.
        """
        self.losses.append((name, loss))
        return loss


class LossCombiner:
    """A function that turns the losses of the rows of each rank into the losses of the batch.

    Args:
        share: The rows of this rank.
        kinds: Pairs of a layer name and a kind of loss, in the order in which the losses are added.
    """

    def __init__(self, share: Share, kinds: Sequence[tuple[str, Kind]]) -> None:
        self._share = share
        self._kinds: Iterator[tuple[str, Kind]] = iter(kinds)

    def __call__(self, name: str, loss: Any) -> Any:
        """Return the loss of the batch.

        Args:
            name: The name of the layer.
            loss: The loss of this rank's rows.

        Raises:
            RuntimeError: If the test of the model did not see this loss here.
        """
        expected, kind = next(self._kinds, ("no other loss", None))
        if kind is None or name != expected:
            raise RuntimeError(
                f"hvdtrain run --wrap: expected {expected} here, as when the model was tested on generated rows. "
                f"Received a loss of {name}. So it is not known how to combine the losses of all ranks. Use "
                "hvd.DistributedOptimizer in the script, and hvdtrain run."
            )
        loss = tf.convert_to_tensor(loss)
        if kind is Kind.ROWS:
            return self._share.join(loss)
        if not loss.dtype.is_floating:
            loss = tf.cast(loss, keras.config.floatx())
        return self._share.mean(loss) if kind is Kind.MEAN else self._share.sum(loss)


def install() -> None:
    """Change `Layer.add_loss`, for the time of `context.adding`."""
    replace(keras.layers.Layer, "add_loss", _with_combined_loss)


def _with_combined_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_loss(self: Any, loss: Any) -> None:
        combine = context.combine()
        if combine is not None:
            loss = keras.tree.map_structure(lambda leaf: combine(self.name, leaf), loss)
        original(self, loss)

    return add_loss
