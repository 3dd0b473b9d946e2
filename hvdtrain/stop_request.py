"""How a training is asked to stop, and how it says that it can go on later: known to ranks and launcher."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# EX_TEMPFAIL of sysexits.h: nothing is wrong, do the same again later.
RESUMABLE = 75

_asked: list[str] = []


class Preempted(SystemExit):
    """Ends a rank whose training has stopped in time: a checkpoint is there, and the same command goes on from it.

    Python takes it for `sys.exit(75)`, so that batch scripts can tell it from a failure.

    Args:
        sentence: Why it stopped, at which step, and where the checkpoint is.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(RESUMABLE)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


def asked() -> str | None:
    """Returns the name of the signal by which this process was asked to stop, or None."""
    return _asked[0] if _asked else None


def note(number: int, frame: FrameType | None = None) -> None:
    """Remembers that this process was asked to stop; a handler for `signal.signal`."""
    _asked.append(signal.Signals(number).name)


@contextlib.contextmanager
def hearing(*numbers: int) -> Iterator[bool]:
    """Takes these signals for a wish to stop, and not for the end; one that a script handles reaches that too.

    Yields:
        Whether they are heard: Python lets only a process's main thread listen.
    """
    before = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, _also(signal.getsignal(number)))
    except ValueError:
        pass
    try:
        yield bool(before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _also(handler: Any) -> Callable[[int, FrameType | None], None]:
    def hear(number: int, frame: FrameType | None) -> None:
        note(number)
        if callable(handler) and handler is not note and handler is not signal.default_int_handler:
            handler(number, frame)

    return hear
