"""What a rank trains on in one step: its rows, with weights that make the mean over ranks the mean over samples."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from hvdtrain.data import nests
from hvdtrain.data.plan import Rows

# Names under which `exact` carries what Keras has no place for; a model's outputs are never called so.
WEIGHT, REAL, SHARE = "hvdtrain/weight", "hvdtrain/real", "hvdtrain/share"


@dataclass(frozen=True)
class Part:
    """One rank's part of one global batch.

    Args:
        x: Inputs, arrays of shape (rows, ...).
        y: Targets, likewise, or None.
        weight: The samples' own weights, 0 for filler; None where there are neither weights nor filler.
        rows: Which of the rows are samples.
    """

    x: Any
    y: Any
    weight: Any
    rows: Rows

    def plain(self) -> Any:
        """Returns x, (x, y) or (x, y, sample_weight), as every training step of Keras takes it.

        Keras divides a weighted loss by the number of rows, filler included, and the gradients of all ranks
        are averaged; the weights are scaled so that the result is the mean over the samples.
        """
        if self.weight is None:
            return self._without_weight()
        scale = self.rows.scale
        return self.x, self.y, nests.mapped(lambda each, _: each * each.dtype.type(scale), self.weight)

    def exact(self) -> Any:
        """Returns the same with weights not yet scaled, and what the scale is made of: see `exact.py`."""
        if self.weight is None:
            return self._without_weight()
        share = np.array([self.rows.share])
        return self.x, self.y, {WEIGHT: self.weight, REAL: self.rows.real, SHARE: share}

    def _without_weight(self) -> Any:
        if self.y is not None:
            return self.x, self.y
        return (self.x,) if isinstance(self.x, tuple) else self.x


def part_of(
    batch: tuple[Any, Any, Any], rows: Rows, pad: bool, class_weight: dict[int, float] | None
) -> Part:
    """Takes a rank's rows of a global batch.

    Args:
        batch: x, y and sample_weight of all samples of the batch.
        rows: Which of them are this rank's.
        pad: Whether batches that are not full are filled up.
        class_weight: Weights by class, or None.
    """
    x, y, given = (nests.rows(each, rows.take) for each in batch)
    if class_weight is not None:
        refuse_both(given)
        given = class_weights(y, class_weight)
    return Part(x, y, weights(given, y, rows, pad), rows)


def weights(given: Any, y: Any, rows: Rows, needed: bool) -> Any:
    """Returns the weights of this rank's rows, 0 for filler.

    Args:
        given: This rank's rows of the user's sample_weight, or None.
        y: This rank's targets; without them Keras has no use for weights.
        rows: Which rows are samples.
        needed: Whether weights are wanted where the user gave none, because some batches hold filler.
    """
    if given is None and (y is None or not needed):
        return None
    if given is None:
        return rows.real.astype(keras.config.floatx())
    return nests.mapped(lambda each, _: _cleared(each, rows.real), given)


def class_weights(y: Any, class_weight: dict[int, float]) -> np.ndarray:
    """Returns each sample's weight by its class, as `fit(class_weight=...)` finds it.

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
    """Raises ValueError where samples that have weights are to be weighted by class too."""
    if sample_weight is not None:
        raise ValueError("hvd.shard: give class_weight or a sample_weight, not both, as Keras demands.")


def _cleared(weight: np.ndarray, real: np.ndarray) -> np.ndarray:
    weight = weight.astype(keras.config.floatx())  # a copy
    weight[~real] = 0
    return weight
