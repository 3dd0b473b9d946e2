"""Where this rank is, noted in a page of memory that its guard can read while the rank itself can do nothing.

Writing a note costs less than a microsecond: a few numbers and words in a page that both processes share. Nobody is
told anything by it; who wants to know reads the page.
"""

import mmap
import os
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

SIZE = 4096

# A wait: since when on this host's monotonic clock (0.0: none), how many there were, whether only Horovod's core
# would know its end, its words, and the ranks it is among (empty: all).
_WAIT = struct.Struct("=dq?240s80s")
_SINCE = struct.Struct("=d")
_PLACE = struct.Struct("=qq48s")  # epoch, step, what the rank does when it does not wait
_PATIENCE = struct.Struct("=d")
_ASIDE = struct.Struct("=32i")  # threads whose work proves nothing
_LISTENER = struct.Struct("=i")  # the thread that takes the request for stacks
_PLACE_AT, _PATIENCE_AT, _ASIDE_AT, _WATCHED_AT, _LISTENER_AT = 512, 768, 1024, 2048, 2052
_NOWHERE = -1

# A rank forked before anything is imported shares its page with its guard; any other process keeps its own.
_page: mmap.mmap | bytearray = bytearray(SIZE)
_waits = 0


@dataclass(frozen=True)
class Note:
    """What a page says.

    Args:
        epoch: The epoch, counted from 0 as Keras does; None outside of `fit`.
        step: The training step that the rank is in or has just finished, counted from 1 over the whole training,
            what was resumed included; None where nobody counts.
        doing: The collective that it waits in, or what else it does; may be empty.
        since: When it began to wait, on this host's monotonic clock in seconds; None when it does not.
        loose: True if it may have gone on: Horovod's core does not tell.
        among: The ranks that take part, as text; empty for all.
        waits: How many waits there were.
        patience: How many seconds it wants for ending by itself.
        aside: Its threads whose work is no sign of life.
        listener: The thread that a request for stacks disturbs least; 0 if there is none.
    """

    epoch: int | None = None
    step: int | None = None
    doing: str = ""
    since: float | None = None
    loose: bool = False
    among: str = ""
    waits: int = 0
    patience: float = 0.0
    aside: tuple[int, ...] = ()
    listener: int = 0


@dataclass(frozen=True)
class Beat:
    """Where a rank is and how its process fares, as its guard tells the launcher.

    Args:
        epoch: As in `Note`.
        step: As in `Note`.
        doing: As in `Note`.
        waiting: For how many seconds it has waited in `doing`; None when it does not.
        loose: As in `Note`.
        among: As in `Note`.
        waits: As in `Note`.
        patience: As in `Note`.
        pid: Its process.
        state: The kernel's letter for what it does: R, S, D, T …
        busy: Whether it makes steps, computes, reads or writes.
    """

    epoch: int | None = None
    step: int | None = None
    doing: str = ""
    waiting: float | None = None
    loose: bool = False
    among: str = ""
    waits: int = 0
    patience: float = 0.0
    pid: int = 0
    state: str = ""
    busy: bool = True


class Waiting:
    """Notes that this rank waits for others, from the beginning to the end of a `with` block.

    Args:
        words: In what: "in allreduce of dense/kernel".
        among: The ranks that take part, as text; empty for all.
    """

    __slots__ = ("_among", "_words")

    def __init__(self, words: bytes, among: bytes = b"") -> None:
        self._words, self._among = words, among

    def __enter__(self) -> None:
        _begin(self._words, self._among, False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _SINCE.pack_into(_page, 0, 0.0)


def left_to_core(words: bytes, among: bytes = b"") -> None:
    """Notes a wait whose end only Horovod's core sees; the next note of any kind ends it."""
    _begin(words, among, True)


def at(epoch: int | None, step: int | None, doing: str = "") -> None:
    """Notes the place in the training.

    Args:
        epoch: The epoch, counted from 0.
        step: The step, counted from 1 over the whole training.
        doing: What the rank does there, where its stack would not say it.
    """
    _SINCE.pack_into(_page, 0, 0.0)
    place = (_NOWHERE if epoch is None else epoch, _NOWHERE if step is None else step)
    _PLACE.pack_into(_page, _PLACE_AT, *(number + 1 for number in place), doing.encode())


def ask_patience(seconds: float) -> None:
    """Lets this rank end by itself after a TERM, because it has something to write first.

    The launcher and the guards then wait this long, the most that any rank has asked for, before they end ranks.

    Args:
        seconds: How long it may take; 0 takes the request back.
    """
    _PATIENCE.pack_into(_page, _PATIENCE_AT, seconds)


def set_aside(threads: Iterable[int]) -> None:
    """Names threads that turn while they wait, such as those of Horovod's core: their work is no sign of life."""
    known = [*threads][:32]
    _ASIDE.pack_into(_page, _ASIDE_AT, *known, *[0] * (32 - len(known)))


def share() -> mmap.mmap:
    """Puts the page where a process that is forked from now on writes to the same one."""
    global _page
    _page = mmap.mmap(-1, SIZE)
    return _page


def watch(page: mmap.mmap) -> None:
    """Notes that a launcher hears of what is in the page, so that its rank need not watch itself."""
    page[_WATCHED_AT] = 1


def listen() -> None:
    """Starts a thread that only sleeps, so that a request for stacks interrupts no system call of any other."""

    def sleep() -> None:
        _LISTENER.pack_into(_page, _LISTENER_AT, threading.get_native_id())
        threading.Event().wait()

    if not _LISTENER.unpack_from(_page, _LISTENER_AT)[0]:
        threading.Thread(target=sleep, name="hvdtrain-heartbeat", daemon=True).start()


def is_watched() -> bool:
    """Tells whether a launcher hears of what this rank notes."""
    return bool(_page[_WATCHED_AT])


def read(page: mmap.mmap | bytearray | None = None) -> Note:
    """Reads a page, this process's own by default."""
    page = _page if page is None else page
    raw = page[:SIZE]
    while (again := page[:SIZE]) != raw:  # it was being written
        raw = again
    since, waits, loose, words, among = _WAIT.unpack_from(raw)
    epoch, step, doing = _PLACE.unpack_from(raw, _PLACE_AT)
    (patience,) = _PATIENCE.unpack_from(raw, _PATIENCE_AT)
    return Note(
        epoch=epoch - 1 if epoch else None,
        step=step - 1 if step else None,
        doing=_text(words if since else doing),
        since=since or None,
        loose=loose,
        among=_text(among if since else b""),
        waits=waits,
        patience=patience,
        aside=tuple(thread for thread in _ASIDE.unpack_from(raw, _ASIDE_AT) if thread),
        listener=_LISTENER.unpack_from(raw, _LISTENER_AT)[0],
    )


def _begin(words: bytes, among: bytes, loose: bool) -> None:
    global _waits
    _waits += 1
    _WAIT.pack_into(_page, 0, time.monotonic(), _waits, loose, words, among)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="ignore")


def _keep_own_page() -> None:
    """What a rank forks, a data loader's worker say, must not write where the rank does."""
    global _page
    _page = bytearray(SIZE)


def keep_workers_away() -> None:
    """Gives every process that is forked from now on a page of its own."""
    os.register_at_fork(after_in_child=_keep_own_page)
