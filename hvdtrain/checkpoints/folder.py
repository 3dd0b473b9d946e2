"""Write and read checkpoints, each a folder of files that is complete or absent.

checkpoints/
    latest                  name of the newest checkpoint
    step-000000311/
        model.weights.h5    and other files
        manifest.json       length and checksum of each file
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

Files = Mapping[str, bytes]

_NAME = re.compile(r"step-(\d{9,})(?:\.(\d+))?")
_MANIFEST = "manifest.json"
_LATEST = "latest"
_PARTIAL = ".partial-"
_REMOVED = ".removed-"


class DamagedError(ValueError):
    """Raised for a checkpoint whose content is not what was written."""


class Folder:
    """The checkpoints of one training.

    Args:
        path: The folder; it is created if it does not exist.

    Raises:
        OSError: If it cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def clean(self) -> None:
        """Remove incomplete files of a run that was killed, and check that the folder is writable.

        Raises:
            OSError: If it cannot be written to.
        """
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
        """Find the checkpoint to resume from.

        Returns:
            The newest complete checkpoint, or None; and a message for each newer one that is damaged.
        """
        complaints: list[str] = []
        for entry in self.entries():
            try:
                check(entry)
                return entry, complaints
            except (DamagedError, OSError) as error:
                complaints.append(f"{entry} is damaged: {error}.")
        return None, complaints

    def write(self, step: int, files: Files, keep: int) -> Path:
        """Add a checkpoint and remove the oldest; existing checkpoints stay complete if the process dies meanwhile.

        Args:
            step: Step number, used in the name.
            files: Name and content of each file.
            keep: Number of checkpoints to keep.

        Returns:
            Its path.

        Raises:
            OSError: If it cannot be written, for example because the disk is full.
        """
        partial = self.path / f"{_PARTIAL}{step}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            manifest = {name: _write(partial / name, content) for name, content in files.items()}
            _write(partial / _MANIFEST, json.dumps({"files": manifest}, indent=1).encode())
            _sync(partial)
            final = self._free_name(step)
            partial.rename(final)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(self.path)
        self._mark(final)
        self._prune(keep)
        return final

    def _free_name(self, step: int) -> Path:
        """Return an unused name: replacing a checkpoint would leave a moment without it."""
        path, again = self.path / f"step-{step:09d}", 0
        while path.exists():
            again += 1
            path = path.with_suffix(f".{again}")
        return path

    def _mark(self, entry: Path) -> None:
        partial = self.path / f"{_PARTIAL}{_LATEST}"
        _write(partial, f"{entry.name}\n".encode())
        partial.replace(self.path / _LATEST)
        _sync(self.path)

    def _prune(self, keep: int) -> None:
        for entry in self.entries()[keep:]:
            # Rename it first, so that a partly removed checkpoint is not reported as damaged.
            removed = entry.with_name(_REMOVED + entry.name)
            with contextlib.suppress(OSError):
                entry.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


class Writer:
    """A thread that writes one checkpoint after another, so that at most one is in memory.

    Args:
        folder: The folder of the checkpoints.
        keep: Number of checkpoints to keep.
    """

    def __init__(self, folder: Folder, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "hvdtrain-checkpoint")
        self._step = 0
        self._pending: Future[Path] | None = None
        self.newest: Path | None = None

    def submit(self, step: int, make: Callable[[], Files]) -> str | None:
        """Wait for the previous checkpoint, then start writing the next.

        Args:
            step: Step number, used in the name.
            make: Function that makes the files, called in the thread.

        Returns:
            Why the previous checkpoint could not be written, or None.
        """
        failure = self.wait()
        self._step = step
        self._pending = self._thread.submit(lambda: self._folder.write(step, make(), self._keep))
        return failure

    def wait(self) -> str | None:
        """Wait until the last checkpoint is written; return why it could not be, or None."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            self.newest = pending.result()
        except Exception as error:
            exists = self.newest is not None and self.newest.exists()
            kept = f"the last complete one is {self.newest}" if exists else "there is no earlier one"
            return f"the checkpoint of step {self._step} could not be written ({error}); {kept}."
        return None

    def close(self) -> str | None:
        """Wait for the last checkpoint and end the thread; return why it could not be written, or None."""
        failure = self.wait()
        self._thread.shutdown()
        return failure


def check(entry: Path) -> None:
    """Raise an error unless the content of a checkpoint is what was written.

    Raises:
        DamagedError: If a file is missing, truncated or changed.
        OSError: If it cannot be read.
    """
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
        with path.open("rb") as file:
            if _sha256(file) != checksum:
                raise DamagedError(f"the checksum of {name} is wrong")


def _number(entry: Path) -> tuple[int, int]:
    step, again = _NAME.fullmatch(entry.name).groups(default="0")  # type: ignore[union-attr]
    return int(step), int(again)


def _write(path: Path, content: bytes) -> dict[str, int | str]:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _sha256(file: object) -> str:
    hashed = hashlib.sha256()
    while block := file.read(1 << 20):  # type: ignore[attr-defined]
        hashed.update(block)
    return hashed.hexdigest()


def _sync(folder: Path) -> None:
    """Write the names in a folder to disk, so that they survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
