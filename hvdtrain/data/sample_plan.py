"""Compute which rank reads which samples, identically on every rank and without communication."""

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

REMAINDERS = ("keep", "drop")


@dataclass(frozen=True)
class Rows:
    """One rank's part of one global batch.

    A rank without samples, because the batch holds fewer samples than there are ranks, still reads one row: it has
    to take the step with the others. Its `own` is 0, so that this row has weight 0.

    Args:
        take: Positions within the global batch, shape (max(own, 1),).
        own: How many of the batch's samples this rank holds.
        total: How many samples the batch holds, over all ranks.
        size: Number of ranks.
    """

    take: np.ndarray
    own: int
    total: int
    size: int

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

    Args:
        length: Number of samples.
        batch_size: Samples per step over all ranks; a multiple of `size`.
        rank: This rank.
        size: Number of ranks.
        shuffle: Whether each epoch has a new order.
        seed: Seed of the order, together with the epoch.
        remainder: Treatment of a last batch that is not full: "keep" or "drop".
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


def checked_batch_size(batch_size: Any, size: int) -> int:
    """Return the global batch as an int.

    Raises:
        ValueError: If it is missing, not positive, or not a multiple of the number of ranks; the nearest are named.
        TypeError: If it is no integer.
    """
    if batch_size is None:
        raise ValueError(
            "hvd.shard: batch_size is missing. Give the number of samples a step over all ranks, for example "
            f"batch_size={32 * size}, which is 32 on each of the {size} ranks."
        )
    try:
        number = operator.index(batch_size)
    except TypeError:
        number = -1
    if isinstance(batch_size, bool | np.bool_) or (number == -1 and batch_size != -1):
        raise TypeError(f"hvd.shard: batch_size must be an integer. Received: batch_size={batch_size!r}.")
    if number < 1 or number % size:
        raise ValueError(
            f"hvd.shard: batch_size is the global batch and must divide by the {size} ranks. Received: "
            f"batch_size={number}. Nearest: {_nearest(number, size)}."
        )
    return number


def checked_remainder(remainder: Any) -> str:
    """Return "keep" or "drop"; "pad" is the name of "keep" up to version 0.1.

    Raises:
        ValueError: For any other value.
    """
    if remainder == "pad":
        return "keep"
    if remainder not in REMAINDERS:
        raise ValueError(
            "hvd.shard: remainder must be 'keep' (train on a last batch that is not full) or 'drop' (leave it "
            f"out). Received: remainder={remainder!r}."
        )
    return remainder


def checked_count(value: Any, name: str) -> int:
    """Return `value` as an int of at least 0, or raise a TypeError or ValueError that names it."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"hvd.shard: {name} must be an integer. Received: {name}={value!r}.") from None
    if number < 0:
        raise ValueError(f"hvd.shard: {name} must be 0 or more. Received: {name}={value!r}.")
    return number


def _nearest(number: int, size: int) -> str:
    below = number // size * size
    return f"{below} or {below + size}" if below > 0 else str(size)
