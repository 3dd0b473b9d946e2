"""Make a model's losses on the ranks' parts of a batch add up to the loss of the whole batch.

The mean over ranks, each weighted by its samples, is right for a loss that is a mean over samples. Other losses are
detected at the first step: a loss is computed on this rank's batch and on two parts of it. If it is the sum of its
parts, it is scaled. If it is neither their mean nor their sum, no scaling makes it right, and rank 0 warns.

Keras divides some losses by the number of valid steps of a mask or by a sum of weights. These are divided by the
numbers of all ranks.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.losses import loss as keras_loss
from keras.src.trainers.compile_utils import CompileLoss

from hvdtrain import runtime
from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.backends.tensorflow.host_calls import counter
from hvdtrain.collectives.engine import Engine, Op
from hvdtrain.collectives.reduction import Reduction
from hvdtrain.data.global_batch import GlobalBatch, bound, current

Tensor = Any

UNKNOWN, MEAN, SUM, OTHER = range(4)
_MEANS = ("mean", "sum_over_batch_size")

# Set while a loss is compared with its parts: then it must depend on its own rows only.
_comparing: ContextVar[bool] = ContextVar("a loss is compared with its parts", default=False)
# Set while a loss is computed: it may call other losses, which must not be scaled again.
_inside: ContextVar[bool] = ContextVar("a loss is computed, of which others may be parts", default=False)


class Losses:
    """The kinds of the losses of one model: a mean over samples, a sum, or neither."""

    def __init__(self) -> None:
        self._known: dict[
            Any, tuple[str, tf.Variable]
        ] = {}  # names of losses, and variables that hold their kinds
        self._reported: set[str] = set()
        self.added = 0  # number of losses from add_loss that this step has computed

    def factor(
        self, step: GlobalBatch, key: Any, name: str, compute: Callable[[Any], Tensor], given: Any
    ) -> Tensor:
        """Return the factor of a loss with which the weighted mean over ranks is the loss of the global batch.

        Args:
            step: The step that runs.
            key: Identifies the loss among those of the model.
            name: Name of the loss in a warning.
            compute: Computes the loss of rows such as `given`.
            given: This rank's rows, a nest of tensors.

        Returns:
            float64 scalar.
        """
        if key not in self._known:
            self._known[key] = name, counter("hvdtrain_loss_kind", device=None)
        variable = self._known[key][1]

        def compare() -> Tensor:
            with bound(_comparing, True):
                return variable.assign(_kind(compute, given), read_value=True)

        try:
            kind = tf.cond(tf.equal(variable, UNKNOWN), compare, lambda: tf.identity(variable))
        except Exception:  # the loss cannot be computed on fewer rows, or the model needs other arguments
            kind = variable.assign(OTHER, read_value=True)
        return tf.where(tf.equal(kind, SUM), step.times_own, 1.0)

    def report(self, engine: Engine) -> None:
        """Warn of losses that are neither a mean nor a sum over samples; all ranks call this at the same time."""
        if not self._known:
            return
        names, variables = zip(*self._known.values(), strict=True)
        kinds = engine.allreduce(np.array([int(variable.numpy()) for variable in variables]), Op.MAX)
        others = {name for name, kind in zip(names, kinds, strict=True) if kind == OTHER} - self._reported
        self._reported |= others
        if others:
            engine.warn(_not_decomposable(sorted(others), engine.size))


def of_all_samples(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement of `Loss.__call__` that scales losses that are sums over samples."""

    def __call__(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:  # noqa: N807
        step = current()
        if step is None or _inside.get() or _comparing.get() or isinstance(self, CompileLoss):
            return call(self, y_true, y_pred, sample_weight)
        given = (y_true, y_pred, sample_weight)
        with bound(_inside, True):
            value = call(self, *given)
            factor = step.losses.factor(
                step, id(self), f"loss {self.name!r}", lambda rows: call(self, *rows), given
            )
        return _scaled(value, factor)

    return __call__


def added_of_all_samples(aggregate: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement of `Model._aggregate_additional_loss`, which takes losses of layers, likewise."""

    def _aggregate_additional_loss(self: Any, loss: Any) -> Any:
        step = current()
        if step is None or step.model is not self or _comparing.get():
            return aggregate(self, loss)
        place = step.losses.added
        step.losses.added += 1
        if place >= len(self.losses) - len(self._get_regularization_losses()):
            return aggregate(self, loss)  # a penalty on weights, which does not depend on samples
        x, _, _ = keras.utils.unpack_x_y_sample_weight(step.batch)

        def added(rows: Any) -> Any:
            trainable = [variable.value for variable in self.trainable_variables]
            others = [variable.value for variable in self.non_trainable_variables]
            options = {"training": False} if self._call_has_training_arg else {}
            _, _, losses = self.stateless_call(trainable, others, rows, return_losses=True, **options)
            return aggregate(self, losses[place])

        name = f"number {place + 1} of the losses from add_loss"
        factor = step.losses.factor(step, ("added", place), name, added, x)
        return _scaled(aggregate(self, loss), factor)

    return _aggregate_additional_loss


def over_all_valid_steps(apply_mask: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement of `apply_mask` that divides by the number of valid steps on all ranks."""

    def masked(sample_weight: Any, mask: Any, dtype: Any, reduction: Any) -> Any:
        if mask is not None and reduction in _MEANS and _comparing.get():
            return apply_mask(sample_weight, mask, dtype, "sum")  # 0 and 1, independent of the other rows
        result = apply_mask(sample_weight, mask, dtype, reduction)
        step = current()
        if mask is None or reduction not in _MEANS or step is None or not step.together:
            return result
        size = tf.cast(tf.size(mask), tf.float64)
        valid = tf.reduce_sum(tf.cast(mask, tf.float64))
        all_sizes, all_valid = tf.unstack(_sum_over_ranks(step, [size, valid]))
        # Keras has multiplied by size / valid; all_sizes / all_valid is what one process multiplies by.
        factor = tf.math.divide_no_nan(all_sizes * valid, all_valid * size)
        return result * tf.cast(factor, result.dtype)

    return masked


def over_all_weights(reduce_values: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement of `reduce_values` that divides by the sum of the weights on all ranks."""

    def reduced(values: Any, sample_weight: Any = None, reduction: Any = "sum_over_batch_size") -> Any:
        weighted = reduction == "mean_with_sample_weight" and sample_weight is not None
        if weighted and _comparing.get():
            # Not divided by the sum of weights, which depends on other rows.
            return reduce_values(values, None, "sum_over_batch_size")
        result = reduce_values(values, sample_weight, reduction)
        step = current()
        if not weighted or step is None or not step.together:
            return result
        weight = tf.reduce_sum(tf.cast(sample_weight, tf.float64))
        (all_weight,) = tf.unstack(_sum_over_ranks(step, [weight]))
        factor = tf.math.divide_no_nan(weight, all_weight) * step.times_own
        return result * tf.cast(factor, result.dtype)

    return reduced


def with_weights_of_samples(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement of `reduce_weighted_values` that rejects weights along other axes than samples."""

    def weighted(values: Any, sample_weight: Any = None, *args: Any, **kwargs: Any) -> Any:
        if sample_weight is not None and runtime.is_initialized() and runtime.engine().size > 1:
            _check_axes(values, sample_weight)
        return reduce(values, sample_weight, *args, **kwargs)

    return weighted


def _check_axes(values: Any, sample_weight: Any) -> None:
    """Raise ValueError for weights that Keras would multiply along the last axis of the losses, not the samples.

    One process raises an error unless that axis is as long as the batch. On several ranks it may be as long as a
    rank's part of the batch, and each process would train with wrong weights without an error.
    """
    losses, weights = keras_loss.squeeze_or_expand_to_same_rank(
        tf.convert_to_tensor(values), tf.convert_to_tensor(sample_weight)
    )
    if None in (losses.shape.rank, weights.shape.rank) or not 0 < weights.shape.rank < losses.shape.rank:
        return
    ones = (1,) * (losses.shape.rank - weights.shape.rank)
    raise ValueError(
        f"sample_weight has {weights.shape.rank} axes and the loss has {losses.shape.rank}: Keras would multiply "
        "the weights along the last axis of the losses, not along the samples. Received: sample_weight of shape "
        f"{_shown(sample_weight.shape)}, losses of shape {_shown(losses.shape)}. Give weights with as many axes, "
        f"such as sample_weight.reshape({', '.join(map(str, (-1, *weights.shape[1:], *ones)))})."
    )


def _shown(shape: Any) -> str:
    return f"({', '.join('batch' if not place else str(size) for place, size in enumerate(shape))})"


def _sum_over_ranks(step: GlobalBatch, numbers: Sequence[Tensor]) -> Tensor:
    """Return the sums of numbers over the ranks that hold samples, float64 of shape (len(numbers),)."""
    mine = tf.stack(numbers) * tf.cast(tf.minimum(step.own, 1), tf.float64)
    return differentiable.allreduce(step.engine, tf.stop_gradient(mine), Reduction(Op.SUM))


def _kind(compute: Callable[[Any], Tensor], given: Any) -> Tensor:
    """Compare the loss of this rank's rows with the losses of their two halves; a single row is used twice."""
    half = _length(given) // 2
    first = _rows(lambda leaf: leaf[: tf.maximum(half, 1)], given)
    rest = _rows(lambda leaf: leaf[half:], given)
    both = keras.tree.map_structure(
        lambda *pair: None if pair[0] is None else tf.concat(pair, 0), first, rest
    )
    values = [tf.reduce_sum(compute(rows)) for rows in (both, first, rest)]
    sizes = [tf.cast(_length(rows), tf.float64) for rows in (both, first, rest)]
    whole, one, other = (tf.cast(value, tf.float64) for value in values)
    scale = tf.reduce_max(tf.abs([whole, one, other]))
    allowed = scale * np.sqrt(np.finfo(values[0].dtype.as_numpy_dtype).eps)
    is_mean = tf.abs(whole - (sizes[1] * one + sizes[2] * other) / sizes[0]) <= allowed
    is_sum = tf.abs(whole - one - other) <= allowed
    # A loss of 0 is both, as some are at the start: the next step decides.
    kind = tf.where(is_mean, tf.where(is_sum, UNKNOWN, MEAN), tf.where(is_sum, SUM, OTHER))
    return tf.cast(tf.where(tf.math.is_finite(scale), kind, UNKNOWN), tf.int64)


def _rows(take: Callable[[Any], Any], given: Any) -> Any:
    return keras.tree.map_structure(lambda leaf: None if leaf is None else take(leaf), given)


def _length(rows: Any) -> Tensor:
    return tf.shape(next(leaf for leaf in keras.tree.flatten(rows) if leaf is not None))[0]


def _scaled(value: Tensor, factor: Tensor) -> Tensor:
    """Multiply a loss; if it is not reduced, multiply only its gradient, since Keras logs its mean."""
    factor = tf.cast(factor, value.dtype)
    if value.shape.rank == 0:
        return value * factor
    return value * factor - tf.stop_gradient(value * (factor - 1))


def _not_decomposable(names: Sequence[str], size: int) -> str:
    return (
        f"{' and '.join(names)} does not follow from the samples one by one: of a batch it is "
        "neither the mean nor the sum of what it is of two parts of the batch (as with Dice, contrastive losses, "
        f"and losses that draw random numbers). Each of the {size} ranks computes it on its own part of a batch, "
        "and the mean of these is trained on, which is not what one process trains on. If that matters, let the "
        "loss return one value a sample that depends on no other sample; or gather what it compares from all "
        "ranks: hvdtrain.tensorflow.allgather is differentiable."
    )
