"""Divide one batch among the ranks and join the results, with the gradients of an undivided batch."""

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.collectives.engine import Engine, Op
from hvdtrain.collectives.scaling import Reduction


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

    @property
    def weight(self) -> Any:
        """Fraction of the batch that belongs to this rank, as a float64 scalar."""
        return tf.cast(self.real, tf.float64) / tf.cast(self.count, tf.float64)

    def take(self, whole: Any, times: Any = 1) -> Any:
        """Return this rank's rows of a tensor.

        Args:
            whole: Tensor of shape (count * times, ...).
            times: Number of rows of the tensor for each row of the batch.
        """
        begin, end = self.start * times, (self.start + self.rows) * times
        if isinstance(whole, tf.SparseTensor):
            sizes = whole.dense_shape[1:]
            offsets = tf.concat([[tf.cast(begin, tf.int64)], tf.zeros_like(sizes)], 0)
            mine = tf.sparse.slice(whole, offsets, tf.concat([[tf.cast(end - begin, tf.int64)], sizes], 0))
            mine.set_shape([None, *whole.shape[1:]])
            return mine
        if isinstance(whole, tf.RaggedTensor) or not whole.dtype.is_floating:
            return whole[begin:end]

        @tf.custom_gradient
        def forward(tensor: Any) -> Any:
            return tensor[begin:end], lambda upstream: self.join(upstream) / self.engine.size

        return forward(whole)

    def join(self, mine: Any) -> Any:
        """Return the rows of all ranks in rank order, shape (count, ...), given the rows of this rank."""
        if not mine.dtype.is_floating:
            return self._gathered(mine)

        @tf.custom_gradient
        def forward(tensor: Any) -> Any:
            def gradient(upstream: Any) -> Any:
                factor = self.engine.size
                if not (isinstance(self.real, int) and self.real):
                    factor *= tf.minimum(self.real, 1)  # 0 for an unused row
                return self.take(tf.convert_to_tensor(upstream)) * tf.cast(factor, tensor.dtype)

            return self._gathered(tensor), gradient

        return forward(mine)

    def replicated(self, whole: Any) -> Any:
        """Return a tensor that is equal on all ranks, for use with the rows; its gradient sums over all ranks."""

        @tf.custom_gradient
        def forward(tensor: Any) -> Any:
            def gradient(upstream: Any) -> Any:
                total = differentiable.allreduce(
                    self.engine, tf.convert_to_tensor(upstream), Reduction(Op.SUM)
                )
                return total / self.engine.size

            return tf.identity(tensor), gradient

        return forward(whole)

    def mean(self, mine: Any) -> Any:
        """Return the mean over the batch, given on each rank the mean over its rows."""
        return self._weighted(mine, self.weight)

    def sum(self, mine: Any) -> Any:
        """Return the sum over the batch, given on each rank the sum over its rows."""
        return self._weighted(mine, tf.minimum(self.real, 1))

    def _weighted(self, mine: Any, weight: Any) -> Any:
        weight = tf.cast(weight, mine.dtype)

        @tf.custom_gradient
        def forward(tensor: Any) -> Any:
            part = tf.math.multiply_no_nan(tensor, weight)
            total = differentiable.allreduce(self.engine, part, Reduction(Op.SUM))
            return total, lambda upstream: upstream * weight * self.engine.size

        return forward(mine)

    def _gathered(self, mine: Any) -> Any:
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
