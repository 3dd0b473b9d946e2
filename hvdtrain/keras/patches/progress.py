"""Record how far the training is: epoch and step in the heartbeat, and whether a progress bar fills the line.

`print_msg`. Keras prints a progress bar without a line break; a message of hvdtrain would continue its line.
Replacement: it also records whether the line is complete, so that a message starts a new one.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras.src.utils import io_utils

from hvdtrain import heartbeat
from hvdtrain.keras.membership import optimizers_of
from hvdtrain.messages import terminal
from hvdtrain.patching import replace


@functools.cache
def install() -> None:
    """Replace `print_msg`. A second call has no effect."""
    replace(io_utils, "print_msg", _recording)


def _recording(print_message: Callable[..., None]) -> Callable[..., None]:
    def run(message: Any, line_break: bool = True) -> None:
        print_message(message, line_break)
        if str(message) and io_utils.is_interactive_logging_enabled():
            terminal.in_line = not (line_break or str(message).endswith("\n"))

    return run


class Progress(keras.callbacks.Callback):
    """Counts epochs and steps over the whole training, for messages about ranks that wait for this one.

    Args:
        already: Number of batches of the first epoch that an earlier run has trained on and this one will skip.
    """

    # Allows Keras to call callbacks asynchronously, in a thread.
    async_safe = True

    def __init__(self, already: int = 0) -> None:
        super().__init__()
        self._already = already
        self._epoch: int | None = None
        self._step: int | None = None
        self._first = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Record the epoch."""
        self._epoch = epoch
        heartbeat.at(epoch, self._step, "beginning of an epoch")

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Record the step that begins."""
        if self._step is None:
            self._step = self._earlier()
        self._first = batch
        heartbeat.at(self._epoch, self._step + 1)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the steps that have ended: several, if Keras runs them as one."""
        assert self._step is not None
        self._step += batch - self._first + 1
        heartbeat.at(self._epoch, self._step)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Record that the epoch's steps are done."""
        heartbeat.at(epoch, self._step, "end of an epoch")

    def on_test_begin(self, logs: Any = None) -> None:
        """Record the validation."""
        heartbeat.at(self._epoch, self._step, "validation")

    def on_train_end(self, logs: Any = None) -> None:
        """Record the end."""
        heartbeat.at(self._epoch, self._step, "after model.fit")

    def _earlier(self) -> int:
        """Return the steps done before this `fit`, read from the optimizer after a resume has restored it."""
        counts = [getattr(optimizer, "iterations", None) for optimizer in optimizers_of(self.model)]
        known = [int(count) for count in counts if count is not None]
        return max(known, default=0) - self._already
