"""Read from /proc whether a process runs, sleeps or is stopped, and whether it makes progress."""

import contextlib
import ctypes
import os
import time
from collections.abc import Collection
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# An idle process uses less than this part of one core.
_IDLE = 0.05
# A process that only prints status messages writes less than this many bytes per second.
_STILL = 16384


class Life:
    """Measure whether a process or its child processes have done any work since the last call."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._work: tuple[float, float, float] = (time.monotonic(), *_work(pid, ()))

    def busy(self, aside: Collection[int] = ()) -> bool:
        """Return whether the process has computed, read or written since the last call, threads `aside` apart."""
        (then, seconds_then, bytes_then) = self._work
        (now, seconds, moved) = self._work = (time.monotonic(), *_work(self._pid, aside))
        passed = max(now - then, 1e-3)
        return (seconds - seconds_then) / passed > _IDLE or (moved - bytes_then) / passed > _STILL


def state(pid: int) -> str:
    """Return the kernel's letter for the state of a process: R running, S sleeping, D device wait, T stopped."""
    return next(iter(_fields(Path(f"/proc/{pid}/stat"))), "")


def waits_in(pid: int) -> str:
    """Return the kernel function in which a process sleeps, such as nfs_wait; empty if unknown."""
    where = _read(Path(f"/proc/{pid}/wchan")).strip()
    return "" if where == "0" else where


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal that would otherwise end it."""
    for line in _read(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def signal_thread(pid: int, thread: int, number: int) -> None:
    """Send a signal to one thread, so that no other is interrupted; to the process if that fails."""
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if not thread or tgkill is None or tgkill(pid, thread, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def threads(pid: int | str = "self") -> set[int]:
    """Return the thread ids of a process."""
    with contextlib.suppress(OSError):
        return {int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()}
    return set()


def _work(pid: int, aside: Collection[int]) -> tuple[float, float]:
    """Return CPU seconds and bytes read and written by a process and its child processes, without some threads."""
    folder = Path(f"/proc/{pid}")
    ticks = sum(map(int, _fields(folder / "stat")[11:15]))
    moved = _moved_bytes(folder / "io")
    for thread in aside:
        ticks -= sum(map(int, _fields(folder / "task" / str(thread) / "stat")[11:13]))
        moved -= _moved_bytes(folder / "task" / str(thread) / "io")
    seconds, total = ticks / _TICKS, float(moved)
    for thread in threads(pid):
        for child in filter(str.isdigit, _read(folder / "task" / str(thread) / "children").split()):
            child_seconds, child_moved = _work(int(child), ())
            seconds += child_seconds
            total += child_moved
    return seconds, total


def _read(path: Path) -> str:
    """Return the text of a file; empty if the process has ended."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def _fields(stat: Path) -> list[str]:
    """Read the fields after the program name, which may contain spaces and parentheses."""
    return _read(stat).rpartition(")")[2].split()


def _moved_bytes(io: Path) -> int:
    with contextlib.suppress(ValueError, IndexError):  # another kernel or a sandbox may write another format
        return sum(int(line.split()[1]) for line in _read(io).splitlines()[:2])
    return 0
