"""Start and stop the timeline, by calls of the script or by environment variables at `hvd.init()`."""

import os
from collections.abc import Mapping

from hvdtrain import runtime
from hvdtrain.messages import logger
from hvdtrain.timeline.recorder import Timeline
from hvdtrain.timeline.recordings import path_of

# The first variable that is set is used.
_PATHS = ("HVDTRAIN_TIMELINE", "HOROVOD_TIMELINE")
_MARKS = ("HVDTRAIN_TIMELINE_MARK_CYCLES", "HOROVOD_TIMELINE_MARK_CYCLES")
# The value with which Horovod's users announce that the script will call start_timeline.
_DYNAMIC = "DYNAMIC"


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Record from now on what each rank does, to see where time goes and for which rank the others wait.

    Call it on all ranks. Each rank writes its own file; `hvdtrain timeline merge` merges them, and
    https://ui.perfetto.dev shows the result. A timeline that is being written to another path is ended first.

    Args:
        file_path: The file of rank 0; rank r writes `<stem>.rank<r><suffix>` beside it.
        mark_cycles: Whether to mark the start of each negotiation with CYCLE_START.

    Raises:
        ValueError: If `hvd.init()` was not called.
        OSError: If the file cannot be written.
    """
    engine = runtime.engine()
    if engine.timeline is not None:
        if engine.timeline.path == path_of(file_path, engine.rank):
            engine.say(f"the timeline {engine.timeline.path} is already being written, and continues.")
            return
        engine.say(f"the timeline {engine.timeline.path} ends here and continues in {file_path}.")
        stop_timeline()
    _start(file_path, mark_cycles)


def stop_timeline() -> None:
    """End the timeline, so that its file is complete. Without a timeline it does nothing.

    Raises:
        ValueError: If `hvd.init()` was not called.
    """
    timeline = runtime.engine().timeline
    if timeline is not None:
        _record(None)
        timeline.close()


def start_if_asked(environ: Mapping[str, str] = os.environ) -> None:
    """Start the timeline that the environment asks for; if it cannot be written, print why and continue."""
    path = _first(environ, _PATHS)
    if path in ("", _DYNAMIC):
        return
    try:
        _start(path, mark_cycles=_first(environ, _MARKS) not in ("", "0"))
    except OSError as error:
        logger.error(f"{error.strerror}: {error.filename}")


def _start(path: str, mark_cycles: bool) -> None:
    engine = runtime.engine()
    _record(Timeline(path, engine.rank, mark_cycles, engine.native_timeline, engine.size))


def _record(timeline: Timeline | None) -> None:
    """Set the timeline of the global engine and of all process sets; later process sets copy the global one."""
    subsets = [engine for _, engine in runtime.engines_of_sets.values() if engine is not None]
    for engine in (runtime.engine(), *subsets):
        engine.timeline = timeline


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((environ[name] for name in names if environ.get(name)), "")
