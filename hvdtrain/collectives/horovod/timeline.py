"""The recording of Horovod's own core: on rank 0, to a file beside ours, and only if asked for before its start."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hvdtrain import settings


@contextmanager
def ready_to_record(comm: Any) -> Iterator[bool]:
    """Let a Horovod that is initialised within this context record later, if any rank's environment asks for it.

    Horovod must know so on all ranks or on none, or they misunderstand each other: an `mpirun` that passes
    HOROVOD_TIMELINE to some hosts only would hang. It must not know the path: that file is ours.

    Args:
        comm: The mpi4py communicator of all ranks.

    Yields:
        True if Horovod will be able to record.
    """
    before = os.environ.pop("HOROVOD_TIMELINE", None)
    asked = bool(before or settings.get("HVDTRAIN_TIMELINE"))
    everywhere = any(comm.allgather(asked))
    if everywhere:
        os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"
    try:
        yield everywhere
    finally:
        os.environ.pop("HOROVOD_TIMELINE", None)
        if before is not None:
            os.environ["HOROVOD_TIMELINE"] = before


def record(horovod: Any, path: Path, mark_cycles: bool) -> Callable[[], None]:
    """Let Horovod's core record from now on; called on rank 0 only, which alone knows of all.

    Args:
        horovod: The module `horovod.tensorflow`, initialised.
        path: The file to write.
        mark_cycles: Whether to mark the beginnings of its cycles.

    Returns:
        What ends the recording.
    """
    horovod.start_timeline(str(path), mark_cycles)

    def stop() -> None:
        with suppress(ValueError):  # Horovod was shut down before, and has closed its file
            horovod.stop_timeline()

    return stop
