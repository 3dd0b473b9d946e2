"""Provide a rank's samples of any step of any epoch: from arrays, or from a user's `keras.utils.PyDataset`."""

import contextlib
import dataclasses
import functools
import random
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from hvdtrain.data import structures
from hvdtrain.data.global_batch import refuse_both
from hvdtrain.data.sample_plan import Part, Plan, Rows, class_weights, deal, part_of, permutation


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Arrays that every rank holds completely, and of which it reads its part; y and sample_weight may be None."""

    x: Any
    y: Any
    sample_weight: Any
    plan: Plan

    @property
    def steps(self) -> int:
        """Number of global batches an epoch."""
        return self.plan.steps

    @property
    def partial(self) -> bool:
        """Whether some global batch is not full."""
        return self.plan.partial

    @property
    def remainder(self) -> str:
        """Treatment of a last batch that is not full: "keep" or "drop"."""
        return self.plan.remainder

    def part(self, epoch: int, step: int) -> Part:
        """Return this rank's rows of a global batch."""
        indices, rows = self.plan.part(self._order(epoch), step)
        x, y, weight = (structures.rows(value, indices) for value in (self.x, self.y, self.sample_weight))
        return Part(x, y, weight, rows)

    def weighted(self, class_weight: dict[int, float]) -> "ArraySource":
        """Return a source of the same samples with weights by class."""
        refuse_both(self.sample_weight)
        return dataclasses.replace(self, sample_weight=class_weights(self.y, class_weight))

    def facts(self) -> structures.Facts:
        """Return the facts that must be the same on all ranks."""
        described = structures.all_described((self.x, self.y, self.sample_weight))
        return [("the number of samples", str(self.plan.length)), *described]

    def begin(self, epoch: int) -> None:
        """Do nothing: arrays need no preparation before an epoch."""

    def end(self, epoch: int) -> None:
        """Do nothing: arrays do not change after an epoch."""

    @functools.cached_property
    def _orders(self) -> dict[int, np.ndarray]:
        return {}  # not an lru_cache of the plan's method, which could not be pickled

    def _order(self, epoch: int) -> np.ndarray:
        """Return the order of an epoch, from a cache that holds only the epoch being read."""
        order = self._orders.get(epoch)
        if order is None:
            order = self.plan.order(epoch)
            self._orders.clear()
            self._orders[epoch] = order
        return order


@dataclasses.dataclass(frozen=True)
class BatchSource:
    """Batches that the user's `__getitem__` makes.

    If `batch_size` equals the rows of a batch, every rank makes every batch and takes its part. If `batch_size`
    is a multiple of rows times size, a rank makes only its own batches.
    """

    dataset: keras.utils.PyDataset
    batch_size: int
    rows: int  # of the user's batches
    last: int  # rows of the last one
    rank: int
    size: int
    shuffle: bool  # whether each epoch takes the batches in a new order
    seed: int
    remainder: str  # "keep" or "drop"
    class_weight: dict[int, float] | None = None

    @property
    def batches(self) -> int:
        """Number of the user's batches that are read, without a last batch that is dropped."""
        count = int(self.dataset.num_batches)
        return count - 1 if self.remainder == "drop" and self.last < self.rows else count

    @property
    def steps(self) -> int:
        """Number of global batches an epoch."""
        return self.batches // self._group if self.remainder == "drop" else -(-self.batches // self._group)

    @property
    def partial(self) -> bool:
        """Whether some global batch is not full."""
        full = self.last == self.rows and self.batches % self._group == 0
        return self.remainder == "keep" and not full

    def part(self, epoch: int, step: int) -> Part:
        """Make the batches of a step and take this rank's rows."""
        group = self.order(epoch)[step * self._group : (step + 1) * self._group]
        batch, rows = self._divided(group[0]) if self._group == 1 else self._whole(group)
        return part_of(batch, rows, self.class_weight)

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of the user's batches; with whole batches, a last one that is not full stays last."""
        if not self.shuffle:
            return np.arange(self.batches)
        if self._group == 1 or self.last == self.rows:
            return permutation(self.batches, self.seed, epoch)
        full = int(self.dataset.num_batches) - 1
        return np.append(permutation(full, self.seed, epoch), np.arange(full, self.batches))

    def weighted(self, class_weight: dict[int, float]) -> "BatchSource":
        """Return a source of the same batches with weights by class."""
        return dataclasses.replace(self, class_weight=class_weight)

    def facts(self) -> structures.Facts:
        """Return the facts that must be the same on all ranks: targets, since inputs may be augmented at random."""
        x, y, _ = _batch(self.dataset, 0)
        part, name = (x, "x of batch 0") if y is None else (y, "y of batch 0")
        counts = f"{self.dataset.num_batches} batches of {self.rows}, the last of {self.last}"
        return [("the number of batches", counts), *structures.described(part, name)]

    def begin(self, epoch: int) -> None:
        """Call the user's `on_epoch_begin` with the same random numbers on all ranks."""
        with _seeded(self.seed, epoch, 0):
            self.dataset.on_epoch_begin()

    def end(self, epoch: int) -> None:
        """Call the user's `on_epoch_end`, where many data sets shuffle themselves."""
        with _seeded(self.seed, epoch, 1):
            self.dataset.on_epoch_end()

    @property
    def _group(self) -> int:
        """Number of the user's batches in a global batch."""
        return self.batch_size // self.rows

    def _divided(self, index: int) -> tuple[Any, Rows]:
        batch = _batch(self.dataset, index)
        count = structures.length(batch)
        if count > self.batch_size:
            raise ValueError(
                f"hvd.shard: batch {index} of the PyDataset holds {count} samples, more than its first with "
                f"{self.rows}. Only the last batch may differ, and hold less."
            )
        return batch, deal(count, self.rank, self.size)

    def _whole(self, group: np.ndarray) -> tuple[Any, Rows]:
        count = self._group // self.size
        mine = group[self.rank * count : (self.rank + 1) * count]
        found = [_batch(self.dataset, index) for index in (mine if len(mine) else group[:1])]
        batch = tuple(_joined(parts) for parts in zip(*found, strict=True))
        own = structures.length(batch) if len(mine) else 0
        # Only the last batch may be smaller; whether the group holds it is the same on all ranks.
        short = self.rows - self.last if int(self.dataset.num_batches) - 1 in group else 0
        return batch, Rows(np.arange(max(own, 1)), own, len(group) * self.rows - short, self.size)


def batch_rows(dataset: keras.utils.PyDataset, batch_size: int | None, size: int) -> tuple[int, int, int]:
    """Read the first and the last batch of a user's data set.

    Returns:
        The global batch, by default the data set's own, the rows of the user's batches, and those of the last one.

    Raises:
        ValueError: If the data set is empty or endless, or its batches cannot be divided.
    """
    count = dataset.num_batches
    if count is None:
        raise ValueError(
            "hvd.shard: this PyDataset is endless (num_batches is None), so it has no epochs that all samples "
            "could be seen once in. Give it a __len__, the number of its batches."
        )
    if count < 1:
        raise ValueError("hvd.shard: the PyDataset holds no batches. Received: length 0.")
    rows, last = (structures.length(_batch(dataset, index)) for index in (0, int(count) - 1))
    if count == 1 and batch_size is not None and rows < batch_size:
        rows = batch_size  # a single batch is also the last, which may be smaller
    wanted = rows if batch_size is None else batch_size
    if wanted % size or (wanted != rows and (wanted % rows or wanted // rows % size)):
        raise ValueError(
            f"hvd.shard: this PyDataset makes batches of {rows}. On {size} ranks batch_size can be {rows}, if "
            f"that divides by {size} (each rank takes a part of every batch), or a multiple of {rows * size} "
            f"(each takes whole batches). Received: batch_size={wanted}."
        )
    return wanted, rows, last


def _batch(dataset: keras.utils.PyDataset, index: int) -> tuple[Any, Any, Any]:
    return structures.all_arrays(structures.unpacked(dataset[int(index)]))


def _joined(parts: Any) -> Any:
    flat = [[leaf for _, leaf in structures.leaves(part)] for part in parts]
    joined = iter([np.concatenate(column) for column in zip(*flat, strict=True)])
    return structures.mapped(lambda leaf, _: next(joined), parts[0])


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, moment: int) -> Iterator[None]:
    """Set `random` and `np.random` to the same state on all ranks, and restore their states afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    common = int(np.random.SeedSequence((seed, epoch, moment)).generate_state(1)[0])
    random.seed(common)
    np.random.seed(common)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
