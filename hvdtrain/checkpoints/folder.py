"""Write and read checkpoints, each a folder of files that is complete or absent.

checkpoints/
    latest                  name of the newest checkpoint
    .lock                   held by the training that uses the folder
    step-000000311/
        model.weights.h5    and other files
        manifest.json       length and checksum of each file
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

Files = Mapping[str, bytes]

_NAME = re.compile(r"step-(\d{9,})(?:\.(\d+))?")
_MANIFEST = "manifest.json"
_LATEST = "latest"
_PARTIAL = ".partial-"
_REMOVED = ".removed-"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

_locked: set[Path] = set()  # file locks do not exclude a second lock in the same process


class DamagedError(ValueError):
    """Raised for a checkpoint whose content is not what was written."""


class InUseError(RuntimeError):
    """Raised if another training uses the folder."""


class Folder:
    """The checkpoints of one training, in a folder that is created if it does not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def clean(self) -> None:
        """Remove incomplete files of a run that was killed; raise OSError if the folder is not writable."""
        for path in self.path.iterdir():
            if path.name.startswith((_PARTIAL, _REMOVED)):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        probe = self.path / f"{_PARTIAL}probe"
        probe.mkdir()
        probe.rmdir()

    def entries(self) -> list[Path]:
        """List the checkpoints, newest first; the one named in the file `latest` precedes higher step numbers."""
        found = sorted(
            (entry for entry in self.path.iterdir() if _NAME.fullmatch(entry.name)), key=_number, reverse=True
        )
        try:
            latest = (self.path / _LATEST).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return found
        return sorted(found, key=lambda entry: entry.name != latest)

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """Return the newest complete checkpoint, or None, and a message for each newer one that is damaged."""
        complaints: list[str] = []
        for entry in self.entries():
            try:
                check(entry)
                return entry, complaints
            except (DamagedError, OSError) as error:
                complaints.append(f"{entry} is damaged: {error}.")
        return None, complaints

    def write(self, step: int, files: Files, keep: int) -> Path:
        """Add a checkpoint, keep the newest `keep` ones, and return its path.

        Existing checkpoints stay complete if the process dies meanwhile, or if this raises OSError.
        """
        partial = self.path / f"{_PARTIAL}{step}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            manifest = {}
            for name, content in files.items():
                _write(partial / name, content)
                manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            _write(partial / _MANIFEST, json.dumps({"files": manifest}, indent=1).encode())
            _sync(partial)
            final = self._free_name(step)
            partial.rename(final)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(self.path)
        replace_file(self.path / _LATEST, f"{final.name}\n".encode())
        self._prune(keep)
        return final

    def _free_name(self, step: int) -> Path:
        """Return an unused name: replacing a checkpoint would leave a moment without it."""
        path, again = self.path / f"step-{step:09d}", 0
        while path.exists():
            again += 1
            path = path.with_suffix(f".{again}")
        return path

    def _prune(self, keep: int) -> None:
        for entry in self.entries()[keep:]:
            # Rename it first, so that a partly removed checkpoint is not reported as damaged.
            removed = entry.with_name(_REMOVED + entry.name)
            with contextlib.suppress(OSError):
                entry.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


class Lock:
    """A lock on a folder, held until `release` or the end of the process, however it ends.

    A second training would remove and resume the checkpoints of the first.

    Raises:
        InUseError: If another process, or another training of this one, holds it; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder.resolve() / ".lock"
        if self._path in _locked:
            raise InUseError(f"{folder} is already in use by another model.fit of this process.")
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        self.works = True
        try:
            # A POSIX lock: it works over NFS, and a forked child does not keep it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._handle_failure(error, folder)
        _locked.add(self._path)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        """Release the folder."""
        if self._path in _locked:
            _locked.discard(self._path)
            os.close(self._file)

    def _handle_failure(self, error: OSError, folder: Path) -> None:
        if error.errno in _NO_LOCKS:
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


def check(entry: Path) -> None:
    """Raise DamagedError if a file of a checkpoint is missing, truncated or changed."""
    try:
        files = json.loads((entry / _MANIFEST).read_bytes())["files"]
        expected = {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise DamagedError(f"{_MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{_MANIFEST} cannot be read") from None
    for name, (size, checksum) in expected.items():
        path = entry / name
        if not path.is_file():
            raise DamagedError(f"{name} is missing")
        if path.stat().st_size != size:
            raise DamagedError(f"{name} has {path.stat().st_size} bytes in place of {size}")
        if _sha256(path) != checksum:
            raise DamagedError(f"the checksum of {name} is wrong")


def replace_file(path: Path, *parts: bytes) -> None:
    """Write a file; if the process dies meanwhile, the file has its earlier or its new content."""
    partial = path.with_name(_PARTIAL + path.stem)
    _write(partial, *parts)
    partial.replace(path)
    _sync(path.parent)


def _number(entry: Path) -> tuple[int, int]:
    step, again = _NAME.fullmatch(entry.name).groups(default="0")  # type: ignore[union-attr]
    return int(step), int(again)


def _described(owner: bytes) -> str:
    try:
        known = json.loads(owner)
        job = f", Slurm job {known['job']}" if known["job"] else ""
        return f"process {known['pid']} on host {known['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _write(path: Path, *parts: bytes) -> None:
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def _sync(folder: Path) -> None:
    """Write the names in a folder to disk, so that they survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
