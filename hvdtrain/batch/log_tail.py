"""A log that is written on another host, shown while it grows."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

EVERY = 0.5  # seconds between two looks


class Log:
    """A file that grows on another host; what has grown goes to standard output, byte for byte."""

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 0

    def show(self) -> bool:
        """Shows what is new and says whether anything was."""
        try:
            with self.path.open("rb") as file:
                # A job with --open-mode=truncate begins anew when it is requeued.
                self._at = self._at if file.seek(0, os.SEEK_END) >= self._at else 0
                file.seek(self._at)
                new = file.read()
        except OSError:
            return False
        self._at += len(new)
        sys.stdout.buffer.write(new)
        sys.stdout.buffer.flush()
        return bool(new)

    def finish(self) -> None:
        """Shows the rest, once nothing has come for a moment."""
        while not until(lambda: not self.show(), EVERY):
            continue
        time.sleep(EVERY)
        self.show()

    def last_words(self, lines: int = 5) -> str:
        """Gives its last lines that say anything."""
        try:
            text = self.path.read_bytes()[-20_000:].decode(errors="replace")
        except OSError as error:
            return f"    (none: {error.strerror})"
        return "\n".join([f"    {line}" for line in text.splitlines() if line.strip()][-lines:])


def until(holds: Callable[[], bool], seconds: float) -> bool:
    """Waits until something holds, at most so long, and says whether it does."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() >= end:
            return False
        time.sleep(EVERY)
    return True
