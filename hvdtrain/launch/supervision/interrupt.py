"""Raise an exception for signals that reach the launcher while no ranks are running, so that it can clean up."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from hvdtrain.launch.supervision.job import ENDING, handled_signals


class Interrupted(BaseException):
    """Raised when a signal asks the launcher to end.

    Args:
        number: The number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def hearing() -> Iterator[None]:
    """Raise `Interrupted` for a signal inside the block; while ranks are running, the job handles signals.

    Raises:
        Interrupted: In the main thread, at any point.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in handled_signals(*ENDING, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
