"""What each model is fed with and trained by: the same for every framework, so that steps can be compared."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BATCHES = 4  # different ones, which take turns
WIDTH, HEADS, BLOCKS = 384, 6, 3  # of the transformer

Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """One model's data and optimizer.

    Args:
        shape: Of one sample; images with their channels last, text as its length.
        classes: How many outputs there are: of an image its kinds, of a token those that may follow.
        batch: Samples a rank and step, where the user does not say.
        rate: The learning rate.
        adam: Whether Adam trains it; else SGD with a momentum of 0.9.
    """

    shape: tuple[int, ...]
    classes: int = 10
    batch: int = 64
    rate: float = 0.01
    adam: bool = False

    @property
    def is_text(self) -> bool:
        """Tells whether a sample is a row of tokens, each of which has the next as its label."""
        return len(self.shape) == 1 and self.classes > 1000

    @property
    def unit(self) -> str:
        """Names what is counted."""
        return "tokens" if self.is_text else "images"

    @property
    def units(self) -> int:
        """Returns how many of them a sample holds."""
        return self.shape[0] if self.is_text else 1

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Makes the batches of one rank.

        Args:
            size: Samples a batch.
            seed: Chooses the numbers; each rank has its own.
        """
        chance = np.random.default_rng(seed)
        for _ in range(BATCHES):
            if self.is_text:
                text = chance.integers(self.classes, size=(size, self.shape[0] + 1))
                yield text[:, :-1].astype("int32"), text[:, 1:].astype("int32")
            else:
                pixels = chance.normal(size=(size, *self.shape)).astype("float32")
                yield pixels, chance.integers(self.classes, size=size).astype("int32")


WORKLOADS = {
    "resnet20": Workload((32, 32, 3)),
    "cnn": Workload((32, 32, 3)),
    "mlp": Workload((1024,)),
    "vgg": Workload((32, 32, 3), batch=16),
    "transformer": Workload((64,), classes=6_000, batch=8, rate=1e-3, adam=True),
}
