"""One voice: what a script prints comes from rank 0; the others are silent until they fail."""

import os
import sys
from types import TracebackType


def install() -> None:
    """Silences this rank's standard output and error; an uncaught error is still told."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    os.environ.setdefault("MPLBACKEND", "Agg")
    voice, sys.stderr = sys.stderr, open(os.devnull, "w")  # noqa: SIM115, PTH123 - for as long as the process lives
    show = sys.excepthook

    def speak(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr = voice
        show(kind, error, trace)

    sys.excepthook = speak
