"""Record the progress of this rank in a page of memory shared with its guard process; read the limits of waits.

The guard can read the page even while the rank is blocked in native code. Writing to it costs less than a
microsecond and sends no message.
"""

import mmap
import os
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hvdtrain import settings

SIZE = 4096

# The current wait: its start on this host's monotonic clock (0.0: no wait), the number of waits so far, whether
# only Horovod's core knows when it ends, its description, and the participating ranks (empty: all).
_WAIT = struct.Struct("=dq?240s80s")
_SINCE = struct.Struct("=d")
_PLACE = struct.Struct("=qq48s")  # epoch + 1, step + 1 (0: unknown), description
_PATIENCE = struct.Struct("=d")
_ASIDE = struct.Struct("=32i")  # threads whose CPU time is no sign of progress
_LISTENER = struct.Struct("=i")  # the thread that receives the signal which requests stacks
_PLACE_AT, _PATIENCE_AT, _ASIDE_AT, _WATCHED_AT, _LISTENER_AT = 512, 768, 1024, 2048, 2052

# A rank is forked from its guard after `share()`, so both have the same page. Any other process has a private page.
_page: mmap.mmap | bytearray = bytearray(SIZE)
_waits = 0


@dataclass(frozen=True)
class Position:
    """What a rank records about itself and its guard reports to the launcher."""

    epoch: int | None = None  # the epoch, counted from 0 as Keras does; None outside of `fit`
    # The training step that the rank is in or has just finished, counted from 1 over the whole training
    # including the steps before a resume; None if steps are not counted.
    step: int | None = None
    # The collective in which the rank waits, or a description of its other work; may be empty.
    doing: str = ""
    # True if the wait may already be over, because Horovod's core does not report its end.
    loose: bool = False
    among: str = ""  # the participating ranks, as text; empty for all ranks
    waits: int = 0  # the number of waits so far
    patience: float = 0.0  # how many seconds the rank needs to end by itself


@dataclass(frozen=True)
class Note(Position):
    """The content of a page."""

    # When the wait began, in seconds on this host's monotonic clock; None if the rank does not wait.
    since: float | None = None
    aside: tuple[int, ...] = ()  # the threads whose CPU time is no sign of progress
    listener: int = 0  # the thread that receives the signal which requests stacks; 0 if there is none


@dataclass(frozen=True)
class Beat(Position):
    """The position of a rank and the state of its process, as its guard reports them."""

    # For how many seconds the rank has waited in `doing`; None if it does not wait.
    waiting: float | None = None
    pid: int = 0  # process id of the rank
    state: str = ""  # the kernel's letter for the state of the process: R, S, D, T …
    busy: bool = True  # whether the rank makes steps, computes, reads or writes


@dataclass(frozen=True)
class Limits:
    """Time limits for ranks that wait for one another."""

    report: float = 60.0  # seconds after which a message says which rank waits for which; 0 is never
    abort: float = 600.0  # seconds after which the job is ended; 0 is never

    @classmethod
    def read(cls) -> "Limits":
        """Read HVDTRAIN_STALL_SECONDS and HVDTRAIN_STALL_ABORT_SECONDS.

        Raises:
            ValueError: If one of them is not a number of seconds.
        """
        report, abort = _seconds("HVDTRAIN_STALL_SECONDS"), _seconds("HVDTRAIN_STALL_ABORT_SECONDS")
        return cls(report, max(abort, report) if abort else 0.0)

    @property
    def interval(self) -> float:
        """The interval in seconds at which a guard checks its rank."""
        return min(max(self.report / 4, 0.2), 5.0) if self.report else 5.0


def stack_file(whose: str = "") -> Path:
    """Return the file for the stacks of a job, or of the rank that `whose` names, in HVDTRAIN_STALL_DIR."""
    folder = Path(settings.get("HVDTRAIN_STALL_DIR"))
    return folder.absolute() / f"hvdtrain-stall-{os.environ.get('SLURM_JOB_ID') or os.getpid()}{whose}.txt"


class Waiting:
    """Record that this rank waits for others inside a `with` block.

    Args:
        description: Description of the wait: "in allreduce of dense/kernel".
        among: The participating ranks, as text; empty for all ranks.
    """

    __slots__ = ("_among", "_description")

    def __init__(self, description: bytes, among: bytes = b"") -> None:
        self._description, self._among = description, among

    def __enter__(self) -> None:
        _begin(self._description, self._among, False)

    def __exit__(self, *error: object) -> None:
        _SINCE.pack_into(_page, 0, 0.0)


def left_to_core(description: bytes, among: bytes = b"") -> None:
    """Record a wait whose end only Horovod's core knows; the next record of any kind ends it."""
    _begin(description, among, True)


def at(epoch: int | None, step: int | None, doing: str = "") -> None:
    """Record the position in the training.

    Args:
        epoch: The epoch, counted from 0.
        step: The step, counted from 1 over the whole training.
        doing: Description of the current work, if its stack does not show it.
    """
    _SINCE.pack_into(_page, 0, 0.0)
    place = [0 if number is None else number + 1 for number in (epoch, step)]
    _PLACE.pack_into(_page, _PLACE_AT, *place, doing.encode())


def ask_patience(seconds: float) -> None:
    """Request seconds for this rank to end by itself after SIGTERM, because it must write something; 0 cancels.

    The launcher and the guards wait for the longest time that any rank has requested before they kill ranks.
    """
    _PATIENCE.pack_into(_page, _PATIENCE_AT, seconds)


def set_aside(threads: Iterable[int]) -> None:
    """Record threads that poll while they wait, such as those of Horovod's core: their CPU time is no progress."""
    known = [*threads][:32]
    _ASIDE.pack_into(_page, _ASIDE_AT, *known, *[0] * (32 - len(known)))


def share() -> mmap.mmap:
    """Replace the page by one that processes forked from now on share with this process, and return it."""
    global _page
    _page = mmap.mmap(-1, SIZE)
    return _page


def watch(page: mmap.mmap) -> None:
    """Mark the page as read by a launcher, so that the rank need not watch itself."""
    page[_WATCHED_AT] = 1


def listen() -> None:
    """Start a thread that only sleeps and receives the signal which requests stacks.

    Without it that signal could interrupt a system call of another thread.
    """

    def sleep() -> None:
        _LISTENER.pack_into(_page, _LISTENER_AT, threading.get_native_id())
        threading.Event().wait()

    if not _LISTENER.unpack_from(_page, _LISTENER_AT)[0]:
        threading.Thread(target=sleep, name="hvdtrain-heartbeat", daemon=True).start()


def is_watched() -> bool:
    """Return whether a launcher receives the records of this rank."""
    return bool(_page[_WATCHED_AT])


def read(page: mmap.mmap | bytearray | None = None) -> Note:
    """Read a page; the page of this process by default."""
    page = _page if page is None else page
    raw = page[:SIZE]
    while (again := page[:SIZE]) != raw:  # it was changed while it was read
        raw = again
    since, waits, loose, description, among = _WAIT.unpack_from(raw)
    epoch, step, doing = _PLACE.unpack_from(raw, _PLACE_AT)
    (patience,) = _PATIENCE.unpack_from(raw, _PATIENCE_AT)
    return Note(
        epoch=epoch - 1 if epoch else None,
        step=step - 1 if step else None,
        doing=_decode(description if since else doing),
        since=since or None,
        loose=loose,
        among=_decode(among if since else b""),
        waits=waits,
        patience=patience,
        aside=tuple(thread for thread in _ASIDE.unpack_from(raw, _ASIDE_AT) if thread),
        listener=_LISTENER.unpack_from(raw, _LISTENER_AT)[0],
    )


def _begin(description: bytes, among: bytes, loose: bool) -> None:
    global _waits
    _waits += 1
    _WAIT.pack_into(_page, 0, time.monotonic(), _waits, loose, description, among)


def _decode(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="ignore")


def keep_workers_away() -> None:
    """Give every process that is forked from now on, such as a data loader's worker, a private page."""

    def use_private_page() -> None:
        global _page
        _page = bytearray(SIZE)

    os.register_at_fork(after_in_child=use_private_page)


def _seconds(name: str) -> float:
    given, default = settings.get(name), settings.get(name, {})
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(
            f"{name} must be a number of seconds, 0 for never. Received: {given!r}. The default is {default}."
        )
    return seconds
