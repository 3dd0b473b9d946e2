"""Store the epoch and step of sharded data, the same on all ranks."""

from dataclasses import dataclass


@dataclass
class Position:
    """An epoch and the steps done in it.

    Args:
        epoch: Number of the epoch; with the seed it determines the order.
        step: The step at which this epoch begins; not 0 only if a run was resumed inside an epoch.
        done: Steps trained on since then.
        readings: How many times the data was iterated from the beginning.
    """

    epoch: int = 0
    step: int = 0
    done: int = 0
    readings: int = 0

    def at(self, index: int, steps: int) -> tuple[int, int]:
        """Return epoch and step of the `index`-th batch from here, in epochs of `steps` batches."""
        return self.epoch + (self.step + index) // steps, (self.step + index) % steps

    def advance(self, count: int, steps: int) -> None:
        """Advance by `count` steps, across the ends of epochs."""
        self.epoch, self.step = self.at(count, steps)
        self.done = 0

    def origin(self) -> dict[str, int]:
        """Return the position at which the current epoch, or window of steps, began."""
        return {"epoch": self.epoch, "step": self.step}

    def next_epoch(self) -> None:
        """Move to the beginning of the next epoch."""
        self.epoch, self.step, self.done = self.epoch + 1, 0, 0
