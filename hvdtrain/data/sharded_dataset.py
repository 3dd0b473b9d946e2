"""Provide this rank's parts of arrays and PyDatasets as a PyDataset, the result of `hvd.shard`."""

from collections.abc import Iterator
from typing import Any

import keras

from hvdtrain.data.arrays import ArraySource
from hvdtrain.data.local_batch import Part
from hvdtrain.data.position import Position
from hvdtrain.data.pydataset import BatchSource


class ShardedDataset(keras.utils.PyDataset):
    """This rank's part of each global batch, for `model.fit` or a loop of your own.

    Each time it has been read to its end a new epoch begins, with a new order if it is shuffled. Looking
    into it (`data[0]`, `next(iter(data))`) changes nothing.

    Args:
        source: The source of the samples.
        position: The current epoch and step.
        window: Steps that are read at a time; by default the rest of the epoch.
        dealt: Whether batches include the numbers of samples, as `fit` and `evaluate` read them.
    """

    def __init__(
        self,
        source: ArraySource | BatchSource,
        position: Position,
        window: int | None = None,
        dealt: bool = False,
    ) -> None:
        own = getattr(source, "dataset", None)
        names = ("workers", "use_multiprocessing", "max_queue_size")
        super().__init__(**({name: getattr(own, name) for name in names} if own is not None else {}))
        self.source = source
        self.position = position
        self._window = window
        self._dealt = dealt

    @property
    def num_batches(self) -> int:
        """Steps left in this epoch: the same on all ranks."""
        return self._window or self.source.steps - self.position.step

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return self.source.steps

    @property
    def partial(self) -> bool:
        """Whether some global batch is not full."""
        return self.source.partial

    def __len__(self) -> int:
        return self.num_batches

    def part(self, index: int) -> Part:
        """Return this rank's part of a step, counted from the step at which the epoch was resumed."""
        if not 0 <= index < self.num_batches:
            raise IndexError(f"step {index} of an epoch with {self.num_batches} steps")
        return self.source.part(*self.position.at(index, self.steps))

    def __getitem__(self, index: int) -> Any:
        part = self.part(index)
        return part.dealt() if self._dealt else part.weighted(self.source.remainder == "keep")

    def __iter__(self) -> Iterator[Any]:
        self.begin()
        for index in range(self.num_batches):
            self.position.done = index + 1
            yield self[index]
        self.end()

    def begin(self) -> None:
        """Begin an epoch, or begin it again after a batch was read as a test."""
        self.position.done = 0
        self.source.begin(self.position.epoch)

    def end(self) -> None:
        """End the epoch, so that the next has another order; or the window, which may span several epochs."""
        before, count = self.position.epoch, self.num_batches
        self.position.advance(count, self.steps)
        for past in range(before, self.position.epoch):
            self.source.end(past)

    def state(self) -> dict[str, int]:
        """Return the position {"epoch": …, "step": …}, from which any number of ranks can continue.

        Returns:
            Keyword arguments for `hvd.shard`: the epoch, and the number of its steps that are done. Inside
            `fit` and inside a loop over this object these are the steps whose batches were trained on.
        """
        epoch, step = self.position.at(self.position.done, self.steps)
        return {"epoch": epoch, "step": step}

    def go_on(self, epoch: int, step: int, read: int) -> None:
        """Move to a position without reading the data before it; a user's PyDataset is notified of the epochs.

        Args:
            epoch: The epoch.
            step: The step in it.
            read: Number of batches before it.
        """
        for past in range(self.position.epoch, epoch):
            self.source.begin(past)
            self.source.end(past)
        self.position.epoch, self.position.step, self.position.done = epoch, step, 0

    def reading(
        self, position: Position, window: int | None, dealt: bool, class_weight: dict[int, float] | None
    ) -> "ShardedDataset":
        """Return the same data from a position on, in the form that the Keras adapter reads."""
        source = self.source if class_weight is None else self.source.weighted(class_weight)
        return ShardedDataset(source, position, window, dealt)
