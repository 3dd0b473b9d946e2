"""Several backward passes for one update: Horovod's window of steps, in terms of Keras' own accumulation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf


@dataclass(frozen=True)
class Window:
    """How many steps' gradients are added up on a rank before they are reduced and applied.

    Keras accumulates with `gradient_accumulation_steps` and hands over the mean of a window; Horovod's
    `backward_passes_per_step` means the sum, unless `average_aggregated_gradients` is set.

    Args:
        steps: Steps a window.
        average: True if the mean of the window is wanted.
    """

    steps: int = 1
    average: bool = False

    @classmethod
    def of(cls, optimizer: keras.optimizers.Optimizer, steps: int, average: bool) -> "Window":
        """Check what a user asked for.

        Raises:
            ValueError: If `steps` is not a positive integer, or the optimizer accumulates by itself already.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(
                f"backward_passes_per_step must be an integer of at least 1. Received: {steps!r}."
            )
        plain = getattr(optimizer, "inner_optimizer", optimizer)
        own = plain.gradient_accumulation_steps
        if steps > 1 and own:
            raise ValueError(
                f"This optimizer accumulates gradients over {own} steps by itself. Give either "
                f"gradient_accumulation_steps={own} to Keras or backward_passes_per_step={steps}, not both."
            )
        return cls(steps, average)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the optimizer's constructor gets so that Keras accumulates."""
        return {"gradient_accumulation_steps": self.steps} if self.steps > 1 else {}

    def added_up(self, gradients: Sequence[Any]) -> Sequence[Any]:
        """Make the sum of the window's gradients out of the mean that Keras hands over, where it is wanted."""
        if self.steps == 1 or self.average:
            return gradients
        return [
            tf.IndexedSlices(each.values * self.steps, each.indices, each.dense_shape)
            if isinstance(each, tf.IndexedSlices)
            else each * self.steps
            for each in gradients
        ]
