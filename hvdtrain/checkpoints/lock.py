"""Lock a folder for one training: a second would remove and resume the checkpoints of the first."""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_held: set[Path] = set()  # file locks do not exclude a second lock in the same process


class InUseError(RuntimeError):
    """Raised if another training uses the folder."""


class Lock:
    """A lock on a folder, held until `release` or the end of the process, however it ends.

    Args:
        folder: The folder; it must exist.

    Raises:
        InUseError: If another process, or another training of this one, holds it; the message names it.
        OSError: If the lock file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder.resolve() / ".lock"
        if self._path in _held:
            raise InUseError(f"{folder} is already in use by another model.fit of this process.")
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        self.works = True
        try:
            # A POSIX lock: it works over NFS, and a forked child does not keep it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._handle_failure(error, folder)
        _held.add(self._path)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        """Release the folder."""
        if self._path in _held:
            _held.discard(self._path)
            os.close(self._file)

    def _handle_failure(self, error: OSError, folder: Path) -> None:
        if error.errno in _UNSUPPORTED:
            self.works = False
            return
        owner = os.pread(self._file, 4096, 0)
        os.close(self._file)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise error
        raise InUseError(
            f"{folder} is in use by {_described(owner)}. Two trainings cannot share one checkpoint directory: wait "
            "for that one, or cancel it, or give this one its own directory."
        ) from None


def _described(owner: bytes) -> str:
    try:
        known = json.loads(owner)
        job = f", Slurm job {known['job']}" if known["job"] else ""
        return f"process {known['pid']} on host {known['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "another process"
