"""A rank that no launcher hears of watches itself: it says how long it has waited, and ends a job that hangs."""

import faulthandler
import os
import sys
import threading
import time
import traceback
from types import FrameType
from typing import final

from hvdtrain import heartbeat, process_activity
from hvdtrain.collectives.engine import Engine
from hvdtrain.heartbeat import Note
from hvdtrain.messages import logger
from hvdtrain.timeouts import Limits, stack_file

# As timeout(1) ends what took too long.
CODE = 124
_FRAMES = 12


def start(engine: Engine) -> None:
    """Watch this rank from now on, where nobody else does and somebody might wait for it.

    Args:
        engine: The ranks.

    Raises:
        ValueError: If HVDTRAIN_STALL_SECONDS or HVDTRAIN_STALL_ABORT_SECONDS is no number of seconds.
    """
    limits = Limits.read()
    if engine.size == 1 or not limits.report:
        return
    if heartbeat.is_watched():
        heartbeat.listen()
    else:
        watch = Unwatched(engine, limits)
        threading.Thread(target=watch.run, name="hvdtrain-heartbeat", daemon=True).start()


@final
class Unwatched:
    """What one rank can say of a hang by itself: where it waits, not for whom.

    Args:
        engine: The ranks.
        limits: When to say it, and when to end all.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._life = process_activity.Life(os.getpid())
        self._told: Note | None = None

    def run(self) -> None:
        """Look every second or less often, until the engine is closed."""
        pause = threading.Event()
        while not self._engine.closed:
            pause.wait(max(self._limits.interval, 1.0))
            self._look(heartbeat.read())

    def _look(self, note: Note) -> None:
        waited = time.monotonic() - note.since if note.since is not None else 0.0
        if waited < self._limits.report or (note.loose and not self._in_core(note)):
            self._go_on(note)
            return
        if self._told is None or self._told.waits != note.waits:
            self._told = note
            self._say(f"{self._sentence(note, waited)}{self._others()}{self._written()}\n{_stack()}")
        if self._limits.abort and waited >= self._limits.abort:
            self._end(note, waited)

    def _go_on(self, note: Note) -> None:
        if self._told is not None and self._told.waits != note.waits:
            self._say(f"rank {self._engine.rank} goes on; it waited {self._told.doing}.")
            self._told = None

    def _in_core(self, note: Note) -> bool:
        """Return whether what was left to Horovod's core can still be there: nothing computes, and a graph runs."""
        frame = _main_frame()
        return (
            not self._life.busy(note.aside)
            and frame is not None
            and "/tensorflow/" in frame.f_code.co_filename
        )

    def _sentence(self, note: Note, waited: float) -> str:
        step = "" if note.step is None else f" at step {note.step}"
        among = f" of {note.among}" if note.among else ""
        who = f"rank {self._engine.rank} of {self._engine.size}"
        return f"{who} waits {note.doing}{among}{step} since {waited:.0f} s."

    def _others(self) -> str:
        if self._engine.rank:
            return ""
        return (
            " A rank that says no such thing is the one that is waited for. `hvdtrain run` in place of mpirun "
            "would name it, and show what it does."
        )

    def _written(self) -> str:
        """Write the stacks of all threads to a file of this rank; returns what there is to say of it."""
        path = stack_file(f".rank{self._engine.rank}")
        try:
            with path.open("a") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            return f" Its stacks could not be written to {path}: {error.strerror}."
        return f" Its stacks are in {path}."

    def _end(self, note: Note, waited: float) -> None:
        self._say(
            f"{self._sentence(note, waited)} That is longer than HVDTRAIN_STALL_ABORT_SECONDS="
            f"{self._limits.abort:g} allows, so the job ends here, with exit code {CODE}."
        )
        self._engine.abort(CODE)
        os._exit(CODE)

    def _say(self, text: str) -> None:
        logger.error(text)


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _stack() -> str:
    """Return the user's part of the main thread's stack, and the calls of ours in which it ends."""
    lines = traceback.format_stack(_main_frame())
    started = [number for number, line in enumerate(lines) if "hvdtrain/script.py" in line]
    return "".join(lines[started[-1] + 1 if started else 0 :][-_FRAMES:]).rstrip()
