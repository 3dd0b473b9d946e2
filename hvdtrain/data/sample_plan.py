"""Decide which samples of each global batch a rank has, the same on every rank and without communication."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from hvdtrain.data import structures
from hvdtrain.data.global_batch import Dealt, packed, refuse_both


@dataclass(frozen=True)
class Rows:
    """One rank's part of one global batch.

    A rank without samples, because the batch holds fewer samples than there are ranks, still reads one row: it has
    to take the step with the others. Its `own` is 0, so that this row has weight 0.
    """

    take: np.ndarray  # positions within the global batch, shape (max(own, 1),)
    own: int  # how many of the batch's samples this rank holds
    total: int  # how many samples the batch holds, over all ranks
    size: int  # number of ranks

    @property
    def weight(self) -> float:
        """Weight of this rank's mean with which the mean over ranks is the mean over samples."""
        return self.own * self.size / self.total


def deal(count: int, rank: int, size: int) -> Rows:
    """Divide a global batch of `count` samples: sample i goes to rank i % size, so parts differ by one at most."""
    take = np.arange(rank, count, size)
    return Rows(take if len(take) else np.zeros(1, int), len(take), count, size)


@dataclass(frozen=True)
class Plan:
    """Division of `length` samples into global batches, and of those among the ranks.

    Batch s of an epoch holds the same samples for any number of ranks; only the assignment to ranks differs.
    With `shuffle` each epoch has a new order, which depends on seed and epoch alone.
    """

    length: int
    batch_size: int
    rank: int = 0
    size: int = 1
    shuffle: bool = False
    seed: int = 0
    remainder: str = "keep"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("hvd.shard: the data holds no samples. Received: length 0.")
        if self.steps == 0:
            raise ValueError(
                f"hvd.shard: remainder='drop' would drop everything: {self.length} samples do not fill one "
                f"batch of {self.batch_size}. Use remainder='keep', or a batch_size of at most {self.length}."
            )

    @property
    def steps(self) -> int:
        """Number of global batches per epoch, the same on all ranks."""
        dropped = self.remainder == "drop"
        return self.length // self.batch_size if dropped else -(-self.length // self.batch_size)

    @property
    def partial(self) -> bool:
        """Whether the last batch is not full."""
        return self.steps * self.batch_size > self.length

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of the samples in an epoch, int64 of shape (length,)."""
        return permutation(self.length, self.seed, epoch) if self.shuffle else np.arange(self.length)

    def part(self, order: np.ndarray, step: int) -> tuple[np.ndarray, Rows]:
        """Return the indices of this rank's samples at a step, and its part of the global batch."""
        batch = order[step * self.batch_size : (step + 1) * self.batch_size]
        rows = deal(len(batch), self.rank, self.size)
        return batch[rows.take], rows


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order for a seed and an epoch, the same on every rank and machine (Philox)."""
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch)))
    return np.random.Generator(bits).permutation(length)


@dataclass
class Position:
    """An epoch and the steps done in it, the same on all ranks."""

    epoch: int = 0  # with the seed it determines the order
    step: int = 0  # the step at which this epoch begins; not 0 only if a run was resumed inside an epoch
    done: int = 0  # steps trained on since then
    readings: int = 0  # how many times the data was iterated from the beginning

    def at(self, index: int, steps: int) -> tuple[int, int]:
        """Return epoch and step of the `index`-th batch from here, in epochs of `steps` batches."""
        return self.epoch + (self.step + index) // steps, (self.step + index) % steps

    def move(self, epoch: int, step: int) -> None:
        """Begin at a step of an epoch."""
        self.epoch, self.step, self.done = epoch, step, 0

    def advance(self, count: int, steps: int) -> None:
        """Advance by `count` steps, across the ends of epochs."""
        self.move(*self.at(count, steps))

    def origin(self) -> dict[str, int]:
        """Return the position at which the current epoch, or window of steps, began."""
        return {"epoch": self.epoch, "step": self.step}

    def state(self, steps: int) -> dict[str, int]:
        """Return the position after the steps that are done, in epochs of `steps` batches."""
        epoch, step = self.at(self.done, steps)
        return {"epoch": epoch, "step": step}


@dataclass(frozen=True)
class Part:
    """One rank's samples of one global batch: nests of arrays of shape (rows, ...), y and weight may be None."""

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
        return packed(self.x, self.y, structures.mapped(self._scaled, weight))

    def _scaled(self, weight: np.ndarray, _: str) -> np.ndarray:
        weight, factor = weight.astype(keras.config.floatx(), copy=False), self.rows.weight
        return weight if factor == 1 else weight * weight.dtype.type(factor)


def part_of(batch: tuple[Any, Any, Any], rows: Rows, class_weight: dict[int, float] | None) -> Part:
    """Take a rank's rows of a global batch, a tuple of x, y and sample_weight."""
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
