"""Find and end every process that the suite has started, whatever group or session it has put itself into."""

import contextlib
import ctypes
import os
import signal
import subprocess
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of processes whose own parent ends, so that `descendants` finds them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reap_orphans(child: subprocess.Popen) -> None:
    """Collect the exit codes of adopted processes; tests wait until these are gone.

    Args:
        child: The process whose exit code Popen itself collects.
    """
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == child.pid and child.poll() is None:
                return
            if ended.si_pid != child.pid:
                os.waitpid(ended.si_pid, 0)


def descendants() -> list[int]:
    """Return the processes below this one that run, parents first."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents().items():
        children.setdefault(parent, []).append(pid)
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def command_of(pid: int) -> str:
    """Return the command line of a process; empty where it has ended."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return " ".join(word.decode(errors="replace") for word in words).strip()
    return ""


def end_all() -> list[str]:
    """Kill the processes below this one until there are none; return their command lines."""
    ended = {}
    while pids := descendants():
        for pid in pids:
            ended.setdefault(pid, command_of(pid))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
    return [command for command in ended.values() if command]


def _parents() -> dict[int, int]:
    """Return the parent of every process that is no zombie."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(stat.parent.name)] = int(parent)
    return found
