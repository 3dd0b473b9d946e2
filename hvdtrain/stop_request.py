"""Record a request to stop the training, and define how a rank ends that can be resumed later."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# EX_TEMPFAIL of sysexits.h: no error, run the same command again later.
RESUMABLE = 75

_asked: list[str] = []


class Preempted(SystemExit):
    """Raised to end a rank after its training has written a checkpoint from which the same command continues.

    Python treats it like `sys.exit(75)`, so that batch scripts can distinguish it from a failure.

    Args:
        sentence: A message: why the training stopped, at which step, and where the checkpoint is.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(RESUMABLE)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


def asked() -> str | None:
    """Return the name of the signal that requested this process to stop, or None."""
    return _asked[0] if _asked else None


def note(number: int, frame: FrameType | None = None) -> None:
    """Record a request to stop; a handler for `signal.signal`."""
    _asked.append(signal.Signals(number).name)


@contextlib.contextmanager
def hearing(*numbers: int) -> Iterator[bool]:
    """Record these signals as requests to stop instead of ending the process.

    If the script has set a handler for a signal, that handler is called too.

    Yields:
        Whether the signals are recorded: Python allows signal handlers only in the main thread.
    """
    before = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, _record_and_call(signal.getsignal(number)))
    except ValueError:
        pass
    try:
        yield bool(before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _record_and_call(handler: Any) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        note(number)
        if callable(handler) and handler is not note and handler is not signal.default_int_handler:
            handler(number, frame)

    return handle
