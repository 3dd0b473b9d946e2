"""Signals that reach the launcher while no ranks are up: it ends with words, and tidies up behind itself."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from hvdtrain.launch.supervision.job import ENDING, heard


class Interrupted(BaseException):
    """A signal asked the launcher to end.

    Args:
        number: Which.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def hearing() -> Iterator[None]:
    """Turn a signal into `Interrupted` as long as the block lasts; while ranks are up, their job hears it.

    Raises:
        Interrupted: In whatever the main thread is doing.
    """

    def hear(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, hear) for number in heard(*ENDING, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
