"""Where a rank is in its data: the same epoch and step on all ranks."""

from dataclasses import dataclass


@dataclass
class Position:
    """An epoch and the steps done in it.

    Args:
        epoch: Number of the epoch; with the seed it decides the order.
        step: The step at which this epoch begins; not 0 only where a run goes on inside an epoch.
        done: Steps trained on since then.
        readings: How often the data have been read from a beginning, by whomever.
    """

    epoch: int = 0
    step: int = 0
    done: int = 0
    readings: int = 0

    def at(self, index: int, steps: int) -> tuple[int, int]:
        """Returns epoch and step of the `index`-th batch from here, where an epoch has `steps` of them."""
        return self.epoch + (self.step + index) // steps, (self.step + index) % steps

    def advance(self, count: int, steps: int) -> None:
        """Goes on by `count` steps, into the next epoch where this one ends."""
        self.epoch, self.step = self.at(count, steps)
        self.done = 0

    def origin(self) -> dict[str, int]:
        """Returns where the epoch, or the window of one, began that is being read."""
        return {"epoch": self.epoch, "step": self.step}

    def next_epoch(self) -> None:
        """Goes to the beginning of the next epoch."""
        self.epoch, self.step, self.done = self.epoch + 1, 0, 0
