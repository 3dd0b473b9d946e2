"""Divide one batch among the ranks, join the results, and keep track of the rows that are computed at present."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.collectives.engine import Engine, Op
from hvdtrain.collectives.reduction import Reduction

_ACTIVATIONS = {"Softmax": tf.nn.softmax, "Sigmoid": tf.nn.sigmoid}

Tensor = Any
# Takes the name of a layer and a loss that it adds; returns the loss that Keras keeps.
Combine = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Share:
    """The rows of one rank in a batch that all ranks hold.

    Operations between `take` and `join` compute these rows only; everything else is the same on all ranks.
    `join` multiplies a gradient by the number of ranks in the backward pass. So the mean over ranks, which the
    optimizer takes later, is the sum of the contributions of all rows, and it does not change a gradient that all
    ranks computed in the same way.

    Args:
        engine: The ranks.
        count: Number of rows of the batch; a tensor if it is not known while a graph is built.
        start: The first row of this rank.
        real: Number of rows of this rank; may be 0.
    """

    engine: Engine
    count: Any
    start: Any
    real: Any

    @classmethod
    def of(cls, engine: Engine, count: Any) -> "Share":
        """Divide `count` rows into blocks that differ by one row at most."""
        start, end = (rank * count // engine.size for rank in (engine.rank, engine.rank + 1))
        return cls(engine, count, start, end - start)

    @property
    def rows(self) -> Any:
        """Number of rows that this rank computes: 1 unused row if the batch has fewer rows than there are ranks."""
        return max(self.real, 1) if isinstance(self.real, int) else tf.maximum(self.real, 1)

    def take(self, whole: Tensor) -> Tensor:
        """Return this rank's rows of a tensor of shape (count, ...)."""
        begin, end = self.start, self.start + self.rows
        if isinstance(whole, tf.SparseTensor):
            sizes = whole.dense_shape[1:]
            offsets = tf.concat([[tf.cast(begin, tf.int64)], tf.zeros_like(sizes)], 0)
            mine = tf.sparse.slice(whole, offsets, tf.concat([[tf.cast(end - begin, tf.int64)], sizes], 0))
            mine.set_shape([None, *whole.shape[1:]])
            return mine
        if isinstance(whole, tf.RaggedTensor) or not whole.dtype.is_floating:
            return whole[begin:end]

        @tf.custom_gradient
        def forward(tensor: Tensor) -> Any:
            return tensor[begin:end], lambda upstream: self.join(upstream) / self.engine.size

        return forward(whole)

    def join(self, mine: Tensor) -> Tensor:
        """Return the rows of all ranks in rank order, shape (count, ...), given the rows of this rank."""
        if not mine.dtype.is_floating:
            return self._gathered(mine)

        @tf.custom_gradient
        def forward(tensor: Tensor) -> Any:
            def gradient(upstream: Tensor) -> Tensor:
                factor = self.engine.size
                if not (isinstance(self.real, int) and self.real):
                    factor *= tf.minimum(self.real, 1)  # 0 for an unused row
                return self.take(tf.convert_to_tensor(upstream)) * tf.cast(factor, tensor.dtype)

            return self._gathered(tensor), gradient

        return forward(mine)

    def replicated(self, whole: Tensor) -> Tensor:
        """Return a tensor that is equal on all ranks, for use with the rows; its gradient sums over all ranks."""

        @tf.custom_gradient
        def forward(tensor: Tensor) -> Any:
            def gradient(upstream: Tensor) -> Tensor:
                return self.sum_over_ranks(tf.convert_to_tensor(upstream)) / self.engine.size

            return tf.identity(tensor), gradient

        return forward(whole)

    def mean(self, mine: Tensor) -> Tensor:
        """Return the mean over the batch, given on each rank the mean over its rows."""
        return self._weighted(mine, tf.cast(self.real, tf.float64) / tf.cast(self.count, tf.float64))

    def sum(self, mine: Tensor) -> Tensor:
        """Return the sum over the batch, given on each rank the sum over its rows."""
        return self._weighted(mine, tf.minimum(self.real, 1))

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all ranks."""
        return differentiable.allreduce(self.engine, tensor, Reduction(Op.SUM))

    def _weighted(self, mine: Tensor, weight: Tensor) -> Tensor:
        weight = tf.cast(weight, mine.dtype)

        @tf.custom_gradient
        def forward(tensor: Tensor) -> Any:
            total = self.sum_over_ranks(tf.math.multiply_no_nan(tensor, weight))
            return total, lambda upstream: upstream * weight * self.engine.size

        return forward(mine)

    def _gathered(self, mine: Tensor) -> Tensor:
        check = tf.debugging.assert_equal(
            tf.shape(mine)[0],
            self.rows,
            "hvdtrain run --wrap: a model returned another number of rows than it received, so its batch cannot be "
            "divided among the ranks. Use hvd.DistributedOptimizer in the script, and hvdtrain run.",
        )
        with tf.control_dependencies([] if check is None else [check]):
            (whole,) = differentiable.allgather(self.engine, [mine[: self.real]])
        whole.set_shape([self.count if isinstance(self.count, int) else None, *mine.shape[1:]])
        return whole


def moved(tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `move(tensor)`, with the mask and the logits that Keras has stored on the tensor moved too.

    Keras computes crossentropy from the logits of a softmax or sigmoid. It finds them in `_keras_logits`, or as the
    input of the operation that made the tensor (`_get_logits` in `keras/src/backend/tensorflow/nn.py`). A copy of
    the tensor has neither, so Keras would compute its loss from clipped probabilities.

    Args:
        tensor: A tensor with rows.
        move: A function that takes some rows of a tensor, or joins the rows of all ranks.
    """
    mask, logits = getattr(tensor, "_keras_mask", None), getattr(tensor, "_keras_logits", None)
    operation = getattr(tensor, "op", None) if isinstance(tensor, tf.Tensor) else None
    if operation is not None and operation.type in _ACTIVATIONS:
        # Compute the activation again from the moved logits. So the result has the operation that Keras looks for,
        # and only one tensor is sent.
        (inputs,) = operation.inputs
        moved_inputs = move(inputs)
        result = _ACTIVATIONS[operation.type](moved_inputs)
        if logits is inputs:
            result._keras_logits, logits = moved_inputs, None
    else:
        result = move(tensor)
    if logits is not None:
        result._keras_logits = move(tf.convert_to_tensor(logits))
    if mask is not None:
        result._keras_mask = move(tf.convert_to_tensor(mask))
    return result


def part(leaf: Any, share: Share) -> Any:
    """Return the rows of a rank in an argument, or the argument itself if it has no rows."""
    if not has_rows(leaf):
        return leaf
    return moved(leaf if tf.is_tensor(leaf) else tf.convert_to_tensor(leaf), share.take)


def has_rows(leaf: Any) -> bool:
    """Return whether an argument of a model is an array or tensor with rows."""
    return (tf.is_tensor(leaf) or isinstance(leaf, np.ndarray)) and leaf.shape != ()


@dataclass(frozen=True)
class Step:
    """The part of the training that runs at present.

    Args:
        engine: The ranks of a running fit, evaluate or predict; None if this rank works alone.
        share: The rows on which a model is called; None if all ranks compute the same.
        combine: Changes the losses that layers add; None if they stay unchanged.
        testing: Whether this rank tests a model on generated rows.
    """

    engine: Engine | None = None
    share: Share | None = None
    combine: Combine | None = None
    testing: bool = False


_NOTHING = Step()
_current: ContextVar[Step] = ContextVar("the part of the training that runs", default=_NOTHING)


def current() -> Step:
    """Return the part of the training that runs at present in this thread."""
    return _current.get()


@contextlib.contextmanager
def running(**changes: Any) -> Iterator[None]:
    """Change attributes of the current step during this context."""
    token = _current.set(dataclasses.replace(_current.get(), **changes))
    try:
        yield
    finally:
        _current.reset(token)


def alone(**changes: Any) -> contextlib.AbstractContextManager[None]:
    """Mark the time in which this rank works alone, on what belongs to no batch, such as a weight."""
    return running(engine=None, share=None, combine=None, **changes)
