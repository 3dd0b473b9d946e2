"""Define data and optimizer of each model, the same for every framework, so that steps can be compared."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BATCHES = 4  # different batches, used in turn
WIDTH, HEADS, BLOCKS = 384, 6, 3  # of the transformer

Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """One model's data and optimizer.

    Args:
        shape: Shape of one sample: (height, width, channels) of an image, (length,) of a text or vector.
        classes: Number of outputs: classes of an image, or tokens of the vocabulary.
        batch: Default number of samples for each rank and step.
        rate: The learning rate.
        adam: Whether the optimizer is Adam; otherwise it is SGD with a momentum of 0.9.
    """

    shape: tuple[int, ...]
    classes: int = 10
    batch: int = 64
    rate: float = 0.01
    adam: bool = False

    @property
    def is_text(self) -> bool:
        """Whether a sample is a sequence of tokens; the label of each token is the next token."""
        return len(self.shape) == 1 and self.classes > 1000

    @property
    def unit(self) -> str:
        """The unit of throughput."""
        return "tokens" if self.is_text else "images"

    @property
    def units(self) -> int:
        """Number of units in a sample."""
        return self.shape[0] if self.is_text else 1

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Yield the batches of one rank.

        Args:
            size: Samples in a batch.
            seed: Seed of the random numbers; each rank has its own.

        Yields:
            Inputs of shape `(size, *shape)`, float32 or int32 for text, and int32 labels.
        """
        rng = np.random.default_rng(seed)
        for _ in range(BATCHES):
            if self.is_text:
                text = rng.integers(self.classes, size=(size, self.shape[0] + 1))
                yield text[:, :-1].astype("int32"), text[:, 1:].astype("int32")
            else:
                pixels = rng.normal(size=(size, *self.shape)).astype("float32")
                yield pixels, rng.integers(self.classes, size=size).astype("int32")


WORKLOADS = {
    "resnet20": Workload((32, 32, 3)),
    "cnn": Workload((32, 32, 3)),
    "mlp": Workload((1024,)),
    "vgg": Workload((32, 32, 3), batch=16),
    "transformer": Workload((64,), classes=6_000, batch=8, rate=1e-3, adam=True),
}
