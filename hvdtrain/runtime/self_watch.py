"""Let a rank without a guard process watch itself: report a long wait, and end a job that hangs."""

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
from hvdtrain.heartbeat import Limits, Note, stack_file
from hvdtrain.messages import logger

# The exit code of timeout(1) after a timeout.
CODE = 124
_FRAMES = 12


def start(engine: Engine) -> None:
    """Watch this rank from now on, if no guard process does and there are other ranks.

    Args:
        engine: The ranks.

    Raises:
        ValueError: If HVDTRAIN_STALL_SECONDS or HVDTRAIN_STALL_ABORT_SECONDS is not a number of seconds.
    """
    limits = Limits.read()
    if engine.size == 1 or not limits.report:
        return
    if heartbeat.is_watched():
        heartbeat.listen()
    else:
        watch = SelfWatch(engine, limits)
        threading.Thread(target=watch.run, name="hvdtrain-heartbeat", daemon=True).start()


@final
class SelfWatch:
    """A thread's loop that reports where this rank waits; a single rank cannot know for which other rank.

    Args:
        engine: The ranks.
        limits: When to report a wait, and when to end all ranks.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._life = process_activity.Life(os.getpid())
        self._reported: Note | None = None

    def run(self) -> None:
        """Check the heartbeat every second or less often, until the engine is closed."""
        pause = threading.Event()
        while not self._engine.closed:
            pause.wait(max(self._limits.interval, 1.0))
            self._check(heartbeat.read())

    def _check(self, note: Note) -> None:
        waited = time.monotonic() - note.since if note.since is not None else 0.0
        if waited < self._limits.report or (note.loose and not self._in_core(note)):
            self._report_end_of_wait(note)
            return
        if self._reported is None or self._reported.waits != note.waits:
            self._reported = note
            self._say(f"{self._wait_message(note, waited)}{self._others()}{self._write_stacks()}\n{_stack()}")
        if self._limits.abort and waited >= self._limits.abort:
            self._end(note, waited)

    def _report_end_of_wait(self, note: Note) -> None:
        if self._reported is not None and self._reported.waits != note.waits:
            self._say(f"rank {self._engine.rank} goes on; it waited {self._reported.doing}.")
            self._reported = None

    def _in_core(self, note: Note) -> bool:
        """Return whether Horovod's core may still run an operation: nothing computes, and a graph runs."""
        frame = _main_frame()
        return (
            not self._life.busy(note.aside)
            and frame is not None
            and "/tensorflow/" in frame.f_code.co_filename
        )

    def _wait_message(self, note: Note, waited: float) -> str:
        step = "" if note.step is None else f" at step {note.step}"
        among = f" of {note.among}" if note.among else ""
        rank = f"rank {self._engine.rank} of {self._engine.size}"
        return f"{rank} waits {note.doing}{among}{step} since {waited:.0f} s."

    def _others(self) -> str:
        if self._engine.rank:
            return ""
        return (
            " The other ranks wait for a rank that prints no such message. `hvdtrain run` instead of mpirun "
            "would name that rank, and show what it does."
        )

    def _write_stacks(self) -> str:
        """Write the stacks of all threads to a file of this rank; return a sentence that names the file."""
        path = stack_file(f".rank{self._engine.rank}")
        try:
            with path.open("a") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            return f" Its stacks could not be written to {path}: {error.strerror}."
        return f" Its stacks are in {path}."

    def _end(self, note: Note, waited: float) -> None:
        self._say(
            f"{self._wait_message(note, waited)} That is longer than HVDTRAIN_STALL_ABORT_SECONDS="
            f"{self._limits.abort:g} allows, so the job ends here, with exit code {CODE}."
        )
        self._engine.abort(CODE)
        os._exit(CODE)

    def _say(self, text: str) -> None:
        logger.error(text)


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _stack() -> str:
    """Return the user's part of the main thread's stack, and the calls of hvdtrain at its end."""
    lines = traceback.format_stack(_main_frame())
    script_lines = [number for number, line in enumerate(lines) if "hvdtrain/script.py" in line]
    return "".join(lines[script_lines[-1] + 1 if script_lines else 0 :][-_FRAMES:]).rstrip()
