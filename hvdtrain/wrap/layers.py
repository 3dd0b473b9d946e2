"""Change the layers of Keras whose results concern more than the rows of one rank: losses, lookups, statistics.

Keras sums all values passed to `add_loss`. A scalar may be a mean over the rows, or a sum; a tensor may hold one
value for each row. `row_trial.py` tests the model on generated rows to find out which. If a loss is none of these,
every rank computes whole batches.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow import numpy as keras_numpy

from hvdtrain.keras.batch_normalization import moments_of_all
from hvdtrain.patching import replace
from hvdtrain.wrap.row_shard import Combine, Share, current

# The name for a model output without rows, which is combined like a loss.
OUTPUT = "an output"


class Kind(Enum):
    """The relation between the loss of a batch and the losses of its parts."""

    ROWS = "one value for each row"
    MEAN = "a mean over rows"
    SUM = "a sum over rows"


def install() -> None:
    """Change `add_loss`, embeddings, products with a sparse matrix, and batch normalization."""
    replace(keras.layers.Layer, "add_loss", _with_combined_loss)
    replace(keras.layers.Embedding, "call", _lookup_once)
    replace(keras_numpy, "matmul", _matmul_of_sparse)
    replace(keras.layers.BatchNormalization, "_moments", _of_all_rows)


def kind_of(
    observations: Sequence[Sequence[np.ndarray]], rows: Sequence[int], tolerance: float
) -> Kind | None:
    """Return the kind of a loss; None if it is none of the kinds, or if the observations do not decide.

    Args:
        observations: For several sets of rows, the loss of all rows and of each part of them.
        rows: Number of rows of each part.
        tolerance: Allowed difference of sums in another order, relative to the largest number.
    """
    if all(_has_rows(losses, rows) for losses in observations):
        return Kind.ROWS if _fits(Kind.ROWS, observations, rows, tolerance) else None
    if any(loss.shape != losses[0].shape for losses in observations for loss in losses):
        return None
    # A loss that is 0 in all observations, or never finite, fits both kinds and so decides nothing.
    finite = [losses for losses in observations if np.isfinite(losses).all()]
    fitting = [kind for kind in (Kind.MEAN, Kind.SUM) if _fits(kind, finite, rows, tolerance)]
    return fitting[0] if len(fitting) == 1 else None


def _has_rows(losses: Sequence[np.ndarray], rows: Sequence[int]) -> bool:
    lengths = [len(loss) if loss.ndim else None for loss in losses]
    return lengths == [sum(rows), *rows]


def _fits(
    kind: Kind, observations: Sequence[Sequence[np.ndarray]], rows: Sequence[int], tolerance: float
) -> bool:
    for whole, *parts in observations:
        if kind is Kind.ROWS:
            expected = np.concatenate(parts)
        else:
            shares = np.array(rows) / sum(rows) if kind is Kind.MEAN else np.ones(len(rows))
            expected = np.tensordot(shares, np.stack(parts), 1)
        largest = max(float(np.max(np.abs(loss), initial=0)) for loss in (whole, *parts))
        if not np.allclose(whole, expected, rtol=0, atol=tolerance * largest, equal_nan=True):
            return False
    return True


def combiner(share: Share, kinds: Sequence[tuple[str, Kind]]) -> Combine:
    """Return the function that turns the losses of each rank's rows into the losses of the batch.

    Args:
        share: The rows of this rank.
        kinds: Pairs of a layer name and a kind of loss, in the order in which the losses are added.

    Returns:
        A function of the name of a layer and a loss. It raises RuntimeError if the test of the model did not see
        this loss here.
    """
    remaining = iter(kinds)

    def combine(name: str, loss: Any) -> Any:
        expected, kind = next(remaining, ("no other loss", None))
        if kind is None or name != expected:
            raise RuntimeError(
                f"hvdtrain run --wrap: expected {expected} here, as when the model was tested on generated rows. "
                f"Received a loss of {name}. So it is not known how to combine the losses of all ranks. Use "
                "hvd.DistributedOptimizer in the script, and hvdtrain run."
            )
        loss = tf.convert_to_tensor(loss)
        if kind is Kind.ROWS:
            return share.join(loss)
        if not loss.dtype.is_floating:
            loss = tf.cast(loss, keras.config.floatx())
        return share.mean(loss) if kind is Kind.MEAN else share.sum(loss)

    return combine


def _with_combined_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_loss(self: Any, loss: Any) -> None:
        combine = current().combine
        if combine is not None:
            loss = keras.tree.map_structure(lambda leaf: combine(self.name, leaf), loss)
        original(self, loss)

    return add_loss


def _lookup_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Divide the indices among the ranks where they do not belong to the rows of a rank, such as positions.

    The gradient of a lookup has one slice for each index that was looked up, and the slices of all ranks are
    concatenated. Keras optimizers square each slice separately, so the result equals that of one process only if no
    two ranks look up the same position.
    """

    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        engine, rows = current().engine, current().share
        if engine is None or not isinstance(inputs, tf.Tensor):
            return original(self, inputs, *args, **kwargs)
        if rows is not None and _has_rows_of(inputs, rows):
            return original(self, inputs, *args, **kwargs)
        indices = tf.reshape(inputs, [-1])
        share = Share.of(engine, tf.shape(indices)[0])
        found = share.join(original(self, share.take(indices), *args, **kwargs))
        found = tf.reshape(found, tf.concat([tf.shape(inputs), [found.shape[-1]]], 0))
        found.set_shape([*inputs.shape, found.shape[-1]])
        return found if rows is None else rows.replicated(found)

    return call


def _has_rows_of(inputs: Any, share: Share) -> bool:
    known = tf.get_static_value(share.rows)
    return inputs.shape.rank != 0 and inputs.shape[0] in (None, None if known is None else int(known))


def _matmul_of_sparse(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give the dense matrix a gradient with one row for each of its rows, instead of one for each lookup."""

    def matmul(x1: Any, x2: Any) -> Any:
        is_lookup = isinstance(x1, tf.SparseTensor) and not isinstance(x2, tf.SparseTensor)
        if current().engine is not None and is_lookup:
            x2 = _with_dense_gradient(tf.convert_to_tensor(x2))
        return original(x1, x2)

    return matmul


@tf.custom_gradient
def _with_dense_gradient(tensor: Any) -> Any:
    return tf.identity(tensor), tf.convert_to_tensor


def _of_all_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """Compute the statistics of `BatchNormalization` over the whole batch, not over the rows of one rank."""

    def moments(self: Any, inputs: Any, mask: Any) -> Any:
        share = current().share
        if current().testing:
            # The statistics of each part would differ. In training they are computed over all rows.
            return self.moving_mean.value, self.moving_variance.value
        mean, variance = original(self, inputs, mask)
        if share is None:
            return mean, variance
        count = _value_count(inputs, mask, self._reduction_axes)
        count *= tf.cast(tf.minimum(share.real, 1), tf.float64)  # an unused row does not count
        return moments_of_all(mean, variance, count, share.sum_over_ranks)

    return moments


def _value_count(inputs: Any, mask: Any, axes: Any) -> Any:
    """Return the number of values on this rank in each mean, as a float64 scalar."""
    if mask is None:
        return tf.reduce_prod(tf.cast(tf.gather(tf.shape(inputs), axes), tf.float64))
    return tf.reduce_sum(tf.cast(tf.broadcast_to(mask, tf.shape(inputs)[:-1]), tf.float64))
