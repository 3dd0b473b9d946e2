"""One training at a time in a folder: a second would prune and continue what the first writes."""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_held: set[Path] = set()  # the system's locks do not keep a process from itself


class InUseError(RuntimeError):
    """Another training uses the folder."""


class Lock:
    """Holds a folder until it is given back, or the process has died in whatever way.

    Args:
        folder: The folder, which exists.

    Raises:
        InUseError: If another process, or another training of this one, holds it; it says which.
        OSError: If the lock file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder.resolve() / ".lock"
        if self._path in _held:
            raise InUseError(f"{folder} is already in use by another model.fit of this process.")
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        self.works = True
        try:
            # Of POSIX's kind, which also works over NFS and does not outlive us in a forked child.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._refused(error, folder)
        _held.add(self._path)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(owner).encode(), 0)

    def give_back(self) -> None:
        """Let others have the folder."""
        if self._path in _held:
            _held.discard(self._path)
            os.close(self._file)

    def _refused(self, error: OSError, folder: Path) -> None:
        if error.errno in _UNSUPPORTED:
            self.works = False
            return
        owner = os.pread(self._file, 4096, 0)
        os.close(self._file)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise error
        raise InUseError(
            f"{folder} is in use by {_words(owner)}. Two trainings cannot share one checkpoint directory: wait for "
            "that one, or cancel it, or give this one a directory of its own."
        ) from None


def _words(owner: bytes) -> str:
    try:
        known = json.loads(owner)
        job = f", Slurm job {known['job']}" if known["job"] else ""
        return f"process {known['pid']} on host {known['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "another process"
