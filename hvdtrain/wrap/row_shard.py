"""One batch, divided among the ranks and put together again, so that gradients come out as if it never had been."""

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.collectives.engine import Engine, Op
from hvdtrain.collectives.scaling import Reduction


@dataclass(frozen=True)
class Share:
    """A rank's rows of one batch that all ranks hold.

    What lies between `take` and `join` is computed for these rows only; everything else is the same on all ranks.
    A gradient that goes back through `join` is multiplied by the number of ranks: afterwards the optimizer's mean
    over ranks is the sum of what the rows contribute, and what all ranks computed alike stays as it is.

    Args:
        engine: The ranks.
        count: Rows of the batch; a tensor where a graph does not know it.
        start: This rank's first row.
        real: Number of its rows.
    """

    engine: Engine
    count: Any
    start: Any
    real: Any

    @classmethod
    def of(cls, engine: Engine, count: Any) -> "Share":
        """Divides `count` rows into blocks that differ by one row at most."""
        start, end = (rank * count // engine.size for rank in (engine.rank, engine.rank + 1))
        return cls(engine, count, start, end - start)

    @property
    def rows(self) -> Any:
        """Rows that this rank computes: one that counts for nothing where there are fewer rows than ranks."""
        return max(self.real, 1) if isinstance(self.real, int) else tf.maximum(self.real, 1)

    @property
    def weight(self) -> Any:
        """What part of the batch this rank's rows are, as a float64 scalar."""
        return tf.cast(self.real, tf.float64) / tf.cast(self.count, tf.float64)

    def take(self, whole: Any, times: Any = 1) -> Any:
        """Returns this rank's rows of a tensor.

        Args:
            whole: Tensor of shape (count * times, ...).
            times: Rows of the tensor for each row of the batch.
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
        """Returns the rows of all ranks in their order, shape (count, ...), from this rank's rows."""
        if not mine.dtype.is_floating:
            return self._gathered(mine)

        @tf.custom_gradient
        def forward(tensor: Any) -> Any:
            def gradient(upstream: Any) -> Any:
                counts = tf.cast(
                    self.engine.size
                    if isinstance(self.real, int) and self.real
                    else self.engine.size * tf.minimum(self.real, 1),
                    tensor.dtype,
                )
                return self.take(tf.convert_to_tensor(upstream)) * counts

            return self._gathered(tensor), gradient

        return forward(mine)

    def replicated(self, whole: Any) -> Any:
        """Returns a tensor that all ranks hold alike, for use on rows; all rows' gradients come back to it."""

        @tf.custom_gradient
        def forward(tensor: Any) -> Any:
            return (
                tf.identity(tensor),
                lambda upstream: (
                    differentiable.allreduce(self.engine, tf.convert_to_tensor(upstream), Reduction(Op.SUM))
                    / self.engine.size
                ),
            )

        return forward(whole)

    def mean(self, mine: Any) -> Any:
        """Return the mean over the batch of what each rank has as a mean over its rows."""
        return self._weighted(mine, self.weight)

    def sum(self, mine: Any) -> Any:
        """Return the sum over the batch of what each rank has as a sum over its rows."""
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
        right = tf.debugging.assert_equal(
            tf.shape(mine)[0],
            self.rows,
            "hvdtrain run --wrap: a model returned another number of rows than it was given. Its batch cannot be "
            "divided among the ranks by rows. Use hvd.DistributedOptimizer in the script, and hvdtrain run.",
        )
        with tf.control_dependencies([] if right is None else [right]):
            (whole,) = differentiable.allgather(self.engine, [mine[: self.real]])
        whole.set_shape([self.count if isinstance(self.count, int) else None, *mine.shape[1:]])
        return whole
