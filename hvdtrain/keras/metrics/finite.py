"""Report the first rank whose loss or metrics are no longer finite."""

from typing import Any

import keras
import numpy as np

from hvdtrain.collectives.engine import Engine, ranks_text


class FirstNonFinite:
    """The first batch of a stage after which a value of this rank's logs was not finite."""

    def __init__(self) -> None:
        self._batch: int | None = None

    def note(self, batch: int, logs: Any) -> None:
        """Check the logs of a batch, and record the batch if a value is not finite."""
        if self._batch is None and not finite(logs):
            self._batch = batch

    def tell(self, engine: Engine, logs: dict[str, Any], when: str) -> None:
        """Print on which rank it began, since one step later the weights of all ranks are not finite.

        Args:
            engine: The ranks. All call this.
            logs: The logs of all ranks, which are not finite.
            when: Epoch and stage.
        """
        everyone = engine.allgather_object(self._batch)
        known = [first_batch for first_batch in everyone if first_batch is not None]
        if not known:
            return
        first = [rank for rank, batch in zip(engine.ranks, everyone, strict=True) if batch == min(known)]
        names = ", ".join(name for name, value in logs.items() if not finite(value))
        engine.say(
            f"{names} not finite (NaN or infinite) in the {when}, from batch {min(known) + 1} on, first on "
            f"{ranks_text(first)}."
        )


def finite(logs: Any) -> bool:
    """Return whether all numbers of a nest are finite."""
    return all(np.all(np.isfinite(value)) for value in keras.tree.flatten(logs or 0.0))
