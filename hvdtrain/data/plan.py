"""Which rank reads which samples: index arithmetic, the same on every rank and without any communication."""

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

REMAINDERS = ("pad", "drop")


@dataclass(frozen=True)
class Rows:
    """One rank's part of one global batch.

    Args:
        take: Positions within the global batch, shape (rows,).
        real: For each of them, whether it is a sample or filler, shape (rows,), bool.
        count: Samples in the global batch, over all ranks.
        size: Number of ranks.
    """

    take: np.ndarray
    real: np.ndarray
    count: int
    size: int

    @property
    def share(self) -> float:
        """How many samples this rank's mean stands for: an equal part of the global batch."""
        return self.count / self.size

    @property
    def scale(self) -> float:
        """What turns a mean over this rank's rows, averaged over ranks, into the mean over the samples."""
        return len(self.take) / self.share


def deal(count: int, batch_size: int, rank: int, size: int) -> Rows:
    """Deals a global batch of `count` samples out like cards, so that what is missing is spread evenly.

    Each rank gets `batch_size / size` rows; where samples run out, its rows are filled with samples of the
    same batch, which layers such as BatchNormalization take better than zeros. One rank needs no filler.
    """
    if size == 1:
        return Rows(np.arange(count), np.ones(count, bool), count, size)
    slots = rank + size * np.arange(batch_size // size)
    return Rows(slots % count, slots < count, count, size)


@dataclass(frozen=True)
class Plan:
    """Divides `length` samples into global batches, and those among the ranks.

    Batch s of an epoch holds the same samples whatever the number of ranks is; only who reads them differs.

    Args:
        length: Number of samples.
        batch_size: Samples a step over all ranks; a multiple of `size`.
        rank: This rank.
        size: Number of ranks.
        shuffle: Whether each epoch has a new order.
        seed: With the epoch, all that the order depends on.
        remainder: What becomes of a last batch that is not full: "pad" or "drop".
    """

    length: int
    batch_size: int
    rank: int = 0
    size: int = 1
    shuffle: bool = False
    seed: int = 0
    remainder: str = "pad"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("hvd.shard: the data holds no samples. Received: length 0.")
        if self.steps == 0:
            raise ValueError(
                f"hvd.shard: remainder='drop' would drop everything: {self.length} samples do not fill one "
                f"batch of {self.batch_size}. Use remainder='pad', or a batch_size of at most {self.length}."
            )

    @property
    def steps(self) -> int:
        """Number of global batches an epoch, the same on all ranks."""
        dropped = self.remainder == "drop"
        return self.length // self.batch_size if dropped else -(-self.length // self.batch_size)

    @property
    def partial(self) -> bool:
        """Whether the last batch is not full, so that it needs filler."""
        return self.steps * self.batch_size > self.length

    def order(self, epoch: int) -> np.ndarray:
        """Returns the order of the samples in an epoch, int64 of shape (length,)."""
        return permutation(self.length, self.seed, epoch) if self.shuffle else np.arange(self.length)

    def part(self, order: np.ndarray, step: int) -> tuple[np.ndarray, Rows]:
        """Returns the indices of this rank's samples at a step, and which of them are real."""
        batch = order[step * self.batch_size : (step + 1) * self.batch_size]
        rows = deal(len(batch), self.batch_size, self.rank, self.size)
        return batch[rows.take], rows


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order that a seed and an epoch stand for, on every rank and machine alike (Philox)."""
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch)))
    return np.random.Generator(bits).permutation(length)


def checked_batch_size(batch_size: Any, size: int) -> int:
    """Returns the global batch as an int.

    Raises:
        ValueError: If it is missing, not positive, or does not divide by the ranks; the nearest are named.
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
    """Returns `remainder`, or raises ValueError with the two values that there are."""
    if remainder not in REMAINDERS:
        raise ValueError(
            "hvd.shard: remainder must be 'pad' (fill the last batch with samples of weight 0) or 'drop' "
            f"(leave it out). Received: remainder={remainder!r}."
        )
    return remainder


def checked_count(value: Any, name: str) -> int:
    """Returns `value` as an int of at least 0, or raises a TypeError or ValueError that names it."""
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
