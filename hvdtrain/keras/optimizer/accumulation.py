"""Accumulate the gradients of several steps for one update, with Keras' own gradient accumulation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf


@dataclass(frozen=True)
class Window:
    """The number of steps whose gradients a rank accumulates before they are reduced and applied.

    Keras accumulates with `gradient_accumulation_steps` and applies the mean of these steps; Horovod's
    `backward_passes_per_step` applies the sum, unless `average_aggregated_gradients` is set.

    Args:
        steps: Number of steps for one update.
        average: Whether the mean over the steps is applied, instead of the sum.
    """

    steps: int = 1
    average: bool = False

    @classmethod
    def of(cls, optimizer: keras.optimizers.Optimizer, steps: int, average: bool) -> "Window":
        """Return the window for the arguments of a user, after checking them.

        Raises:
            ValueError: If `steps` is not a positive integer, or the optimizer already accumulates gradients.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(
                f"backward_passes_per_step must be an integer of at least 1. Received: {steps!r}."
            )
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        own = inner.gradient_accumulation_steps
        if steps > 1 and own:
            raise ValueError(
                f"This optimizer already accumulates gradients over {own} steps. Give either "
                f"gradient_accumulation_steps={own} to Keras or backward_passes_per_step={steps}, not both."
            )
        return cls(steps, average)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the optimizer's constructor that make Keras accumulate."""
        return {"gradient_accumulation_steps": self.steps} if self.steps > 1 else {}

    def rescale(self, gradients: Sequence[Any]) -> Sequence[Any]:
        """Return the sum over the steps in place of Keras' mean, unless the mean is to be applied."""
        if self.steps == 1 or self.average:
            return gradients
        return [
            tf.IndexedSlices(grad.values * self.steps, grad.indices, grad.dense_shape)
            if isinstance(grad, tf.IndexedSlices)
            else grad * self.steps
            for grad in gradients
        ]
