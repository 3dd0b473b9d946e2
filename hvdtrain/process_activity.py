"""What the kernel says about a process: whether it runs, sleeps or was stopped, and whether it gets anywhere."""

import contextlib
import ctypes
import os
import time
from collections.abc import Collection
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# Less than this part of one core is what an idle process spends on waking up.
_IDLE = 0.05
# Less than this many bytes a second is what a process writes that does nothing but say so.
_STILL = 16384


class Life:
    """Tells whether a process, with those it has started, has done anything since it was last asked.

    Args:
        pid: The process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._work: tuple[float, float, float] = (time.monotonic(), *_work(pid, ()))

    def busy(self, aside: Collection[int] = ()) -> bool:
        """Compares with the last call.

        Args:
            aside: Threads that do not count.
        """
        (then, seconds_then, bytes_then) = self._work
        (now, seconds, moved) = self._work = (time.monotonic(), *_work(self._pid, aside))
        passed = max(now - then, 1e-3)
        return (seconds - seconds_then) / passed > _IDLE or (moved - bytes_then) / passed > _STILL


def state(pid: int) -> str:
    """Returns the kernel's letter for a process: R runs, S sleeps, D waits for a device, T is stopped."""
    fields = _fields(Path(f"/proc/{pid}/stat"))
    return fields[0] if fields else ""


def waits_in(pid: int) -> str:
    """Returns where in the kernel a process sleeps, such as nfs_wait; empty where that is not told."""
    with contextlib.suppress(OSError):
        where = Path(f"/proc/{pid}/wchan").read_text().strip()
        return "" if where == "0" else where
    return ""


def catches(pid: int, number: int) -> bool:
    """Tells whether a process has a handler for a signal, which would otherwise end it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def signal_thread(pid: int, thread: int, number: int) -> None:
    """Signals one thread of a process, so that no other is interrupted; the process where there is none such."""
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if not thread or tgkill is None or tgkill(pid, thread, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def threads(pid: int | str = "self") -> set[int]:
    """Lists a process's threads."""
    with contextlib.suppress(OSError):
        return {int(each.name) for each in Path(f"/proc/{pid}/task").iterdir()}
    return set()


def _work(pid: int, aside: Collection[int]) -> tuple[float, float]:
    """Sums up seconds of computing and bytes read and written, by a process and all that it has started."""
    here = Path(f"/proc/{pid}")
    apart = [here / "task" / str(thread) for thread in aside]
    ticks = sum(map(int, _fields(here / "stat")[11:15])) - sum(_ticks(thread) for thread in apart)
    moved = _moved(here / "io") - sum(_moved(thread / "io") for thread in apart)
    below = [_work(child, ()) for thread in threads(pid) for child in _children(here / "task" / str(thread))]
    return ticks / _TICKS + sum(each[0] for each in below), moved + sum(each[1] for each in below)


def _ticks(folder: Path) -> int:
    return sum(map(int, _fields(folder / "stat")[11:13]))


def _fields(stat: Path) -> list[str]:
    """Reads the fields after the name, which may hold anything."""
    try:
        return stat.read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _moved(io: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return sum(int(line.split()[1]) for line in io.read_text().splitlines()[:2])
    return 0


def _children(folder: Path) -> list[int]:
    with contextlib.suppress(OSError, ValueError):
        return [int(word) for word in (folder / "children").read_text().split()]
    return []
