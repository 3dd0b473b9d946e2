"""Where numbers end: which rank was the first whose loss or metrics were no longer finite."""

from typing import Any

import keras
import numpy as np

from hvdtrain.collectives.engine import Engine, ranks_text


class FirstLost:
    """Remembers the first batch of a stage after which something in this rank's logs was not finite."""

    def __init__(self) -> None:
        self._batch: int | None = None

    def note(self, batch: int, logs: Any) -> None:
        """Looks at the logs of a batch."""
        if self._batch is None and not finite(logs):
            self._batch = batch

    def tell(self, engine: Engine, logs: dict[str, Any], when: str) -> None:
        """Says on which rank it began, since one step later all ranks' weights have lost it too.

        Args:
            engine: The ranks. All call this.
            logs: The logs of all ranks, which are not finite.
            when: Epoch and stage.
        """
        everyone = engine.allgather_object(self._batch)
        known = [each for each in everyone if each is not None]
        if not known:
            return
        first = [rank for rank, each in zip(engine.ranks, everyone, strict=True) if each == min(known)]
        names = ", ".join(name for name, value in logs.items() if not finite(value))
        engine.say(
            f"{names} not finite (NaN or infinite) in the {when}, from batch {min(known) + 1} on, first on "
            f"{ranks_text(first)}."
        )


def finite(logs: Any) -> bool:
    """Tells whether all numbers of a nest are finite."""
    return all(np.all(np.isfinite(each)) for each in keras.tree.flatten(logs or 0.0))
