"""Combine the losses that layers add for a rank's rows into the losses of the whole batch.

Keras sums whatever `add_loss` is given. A scalar may be a mean over the rows, or a sum; a tensor may hold one value
for each row. `row_trial.py` finds out which by trying the model on made-up rows. A loss that is none of these makes
every rank compute whole batches.
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

# The name under which a model's output without rows is combined as losses are.
OUTPUT = "an output"


class Kind(Enum):
    """How the loss of a batch follows from the losses of its parts."""

    ROWS = "one value for each row"
    MEAN = "a mean over rows"
    SUM = "a sum over rows"


@dataclass(frozen=True)
class Observation:
    """A loss of made-up rows: computed from all rows, and from each part of them.

    Args:
        whole: The loss of all rows.
        parts: The losses of the parts.
        rows: How many rows each part has.
    """

    whole: np.ndarray
    parts: Sequence[np.ndarray]
    rows: Sequence[int]


def kind_of(observations: Sequence[Observation], tolerance: float) -> Kind | None:
    """Return how a loss depends on rows; None if it is none of the kinds, or nothing tells which.

    Args:
        observations: The same loss for several sets of rows.
        tolerance: By how much sums in another order may differ, relative to the largest number.
    """
    if all(_has_rows(each) for each in observations):
        joined = [_close(each, np.concatenate(each.parts), tolerance) for each in observations]
        return Kind.ROWS if all(joined) else None
    if any(part.shape != each.whole.shape for each in observations for part in each.parts):
        return None
    # A loss that is 0 everywhere, or not a number, says nothing.
    telling = [each for each in observations if np.isfinite([each.whole, *each.parts]).all()]
    fitting = []
    for kind in (Kind.MEAN, Kind.SUM):
        if all(_close(each, _expected(each, kind), tolerance) for each in telling):
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


class Recorded:
    """Keep the losses that layers add, unchanged.

    Attributes:
        found: The name of the layer, and the loss, in the order in which they were added.
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, Any]] = []

    def __call__(self, name: str, loss: Any) -> Any:
        """Keep one loss.

        Args:
            name: The name of the layer.
            loss: The loss.
        """
        self.found.append((name, loss))
        return loss


class Joined:
    """Turn the losses of a rank's rows into those of the batch.

    Args:
        share: The rank's rows.
        kinds: The name of the layer, and the kind of loss, in the order in which they are added.
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
            RuntimeError: If it was not added when the model was tried.
        """
        expected, kind = next(self._kinds, ("no other loss", None))
        if kind is None or name != expected:
            raise RuntimeError(
                f"hvdtrain run --wrap: expected {expected} here, as when the model was tried on made-up rows. "
                f"Received a loss of {name}. It is not known how the losses of all ranks' rows combine. Use "
                "hvd.DistributedOptimizer in the script, and hvdtrain run."
            )
        loss = tf.convert_to_tensor(loss)
        if kind is Kind.ROWS:
            return self._share.join(loss)
        if not loss.dtype.is_floating:
            loss = tf.cast(loss, keras.config.floatx())
        return self._share.mean(loss) if kind is Kind.MEAN else self._share.sum(loss)


def install() -> None:
    """Change `Layer.add_loss`, for as long as `context.adding` lasts."""
    replace(keras.layers.Layer, "add_loss", _of_the_batch)


def _of_the_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_loss(self: Any, loss: Any) -> None:
        combine = context.combine()
        if combine is not None:
            loss = keras.tree.map_structure(lambda each: combine(self.name, each), loss)
        original(self, loss)

    return add_loss
