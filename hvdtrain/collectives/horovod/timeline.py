"""Let Horovod's core write its own timeline on rank 0; this must be requested before the core starts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hvdtrain import settings


@contextmanager
def ready_to_record(comm: Any) -> Iterator[bool]:
    """Let a Horovod that is initialized inside the block record later, if the environment of any rank requests it.

    Horovod must know this on all ranks or on none, because otherwise the ranks misread each other's messages: an
    `mpirun` that passes HOROVOD_TIMELINE to some hosts only would hang. Horovod must not know the path, because
    hvdtrain writes that file.

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
    """Let Horovod's core record from now on; called on rank 0 only, which coordinates all ranks.

    Args:
        horovod: The module `horovod.tensorflow`, initialised.
        path: The file to write.
        mark_cycles: Whether to mark the start of each cycle.

    Returns:
        A function that stops the recording.
    """
    horovod.start_timeline(str(path), mark_cycles)

    def stop() -> None:
        with suppress(ValueError):  # Horovod was already shut down, and has closed its file
            horovod.stop_timeline()

    return stop
