"""Take one rank's part of a global batch, for `fit` and for custom training loops."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from hvdtrain.data import structures
from hvdtrain.data.global_batch import Dealt
from hvdtrain.data.sample_plan import Rows


@dataclass(frozen=True)
class Part:
    """One rank's part of one global batch.

    Args:
        x: Inputs, arrays of shape (rows, ...).
        y: Targets, likewise, or None.
        weight: The user's sample weights, likewise, or None.
        rows: Which samples of the global batch these are.
    """

    x: Any
    y: Any
    weight: Any
    rows: Rows

    def dealt(self) -> Any:
        """Return the part for `fit` and `evaluate`: on several ranks with the numbers of samples."""
        batch = packed(self.x, self.y, self.weight)
        return batch if self.rows.size == 1 else Dealt(batch, np.array([self.rows.own, self.rows.total]))

    def weighted(self, keep: bool) -> Any:
        """Return x, (x, y) or (x, y, sample_weight) for a custom training loop.

        The mean of weighted losses on each rank, averaged over the ranks, is the mean over the samples.

        Args:
            keep: Whether batches that are not full are kept; then all batches with targets have weights.
        """
        weight = self.weight
        if weight is None and keep and self.y is not None:
            weight = np.ones(len(self.rows.take), keras.config.floatx())
        if weight is not None:
            weight = structures.mapped(lambda leaf, _: _times(leaf, self.rows.weight), weight)
        return packed(self.x, self.y, weight)


def part_of(batch: tuple[Any, Any, Any], rows: Rows, class_weight: dict[int, float] | None) -> Part:
    """Take a rank's rows of a global batch.

    Args:
        batch: x, y and sample_weight of all samples of the batch.
        rows: Which of them are this rank's.
        class_weight: Weights by class, or None.
    """
    x, y, weight = (structures.rows(value, rows.take) for value in batch)
    if class_weight is not None:
        refuse_both(weight)
        weight = class_weights(y, class_weight)
    return Part(x, y, weight, rows)


def class_weights(y: Any, class_weight: dict[int, float]) -> np.ndarray:
    """Return each sample's weight by its class, as `fit(class_weight=...)` computes it.

    Args:
        y: Class numbers of shape (samples,) or (samples, 1), or one-hot rows.
        class_weight: Weight of each class; a class that is not in it weighs 1.

    Raises:
        ValueError: If there are several targets, which Keras cannot weigh by class either.
    """
    if not isinstance(y, np.ndarray):
        raise ValueError("hvd.shard: class_weight needs one array of targets. Received: several, or none.")
    if y.ndim > 1:
        y = y.argmax(-1) if y.shape[-1] > 1 else y[..., 0]
    numbers = np.round(y).astype(np.int64)
    result = np.ones(numbers.shape, keras.config.floatx())
    for number, weight in class_weight.items():
        result[numbers == int(number)] = weight
    return result


def refuse_both(sample_weight: Any) -> None:
    """Raise ValueError if both sample weights and class weights are given."""
    if sample_weight is not None:
        raise ValueError("hvd.shard: give class_weight or a sample_weight, not both, as Keras demands.")


def packed(x: Any, y: Any, weight: Any) -> Any:
    """Return x, (x, y) or (x, y, sample_weight), as a training step of Keras takes it."""
    if weight is not None:
        return x, y, weight
    if y is not None:
        return x, y
    return (x,) if isinstance(x, tuple) else x


def _times(weight: np.ndarray, factor: float) -> np.ndarray:
    weight = weight.astype(keras.config.floatx(), copy=False)
    return weight if factor == 1 else weight * weight.dtype.type(factor)
