"""A folder of checkpoints, each a folder of files that appears whole or not at all.

checkpoints/
    latest                  the name of the newest
    step-000000311/
        model.weights.h5    and other files
        manifest.json       length and checksum of each of them
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

_NAME = re.compile(r"step-(\d{9,})(?:\.(\d+))?")
_MANIFEST = "manifest.json"
_LATEST = "latest"
_PARTIAL = ".partial-"
_REMOVED = ".removed-"


class DamagedError(ValueError):
    """A checkpoint that is not what was written."""


class Folder:
    """Reads and writes the checkpoints of one training.

    Args:
        path: The folder; it is made if it is not there.

    Raises:
        OSError: If it cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def clean(self) -> None:
        """Make sure that it can be written to, and removes what a run that was killed left half done.

        Raises:
            OSError: If it cannot be written to.
        """
        for each in self.path.iterdir():
            if each.name.startswith((_PARTIAL, _REMOVED)):
                shutil.rmtree(each, ignore_errors=True) if each.is_dir() else each.unlink(missing_ok=True)
        probe = self.path / f"{_PARTIAL}probe"
        probe.mkdir()
        probe.rmdir()

    def entries(self) -> list[Path]:
        """List the checkpoints, the newest first; a marker that names one counts more than its number."""
        found = sorted(
            (each for each in self.path.iterdir() if _NAME.fullmatch(each.name)), key=_number, reverse=True
        )
        try:
            latest = (self.path / _LATEST).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return found
        return sorted(found, key=lambda each: each.name != latest)

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """Find the checkpoint to go on from.

        Returns:
            The newest that is whole, or None; and a sentence for each newer one that is not.
        """
        complaints: list[str] = []
        for each in self.entries():
            try:
                check(each)
                return each, complaints
            except (DamagedError, OSError) as error:
                complaints.append(f"{each} is damaged: {error}.")
        return None, complaints

    def write(self, step: int, files: Mapping[str, bytes], keep: int) -> Path:
        """Add a checkpoint and removes the oldest; whenever the process dies, all that were there are whole.

        Args:
            step: By which it is named.
            files: Name and content of each file.
            keep: How many checkpoints stay.

        Returns:
            Its path.

        Raises:
            OSError: If it cannot be written, because the disk is full, say.
        """
        partial = self.path / f"{_PARTIAL}{step}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            manifest = {name: _written(partial / name, content) for name, content in files.items()}
            _written(partial / _MANIFEST, json.dumps({"files": manifest}, indent=1).encode())
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
        """What is there is never replaced: between its end and the new one's name there would be nothing."""
        path, again = self.path / f"step-{step:09d}", 0
        while path.exists():
            again += 1
            path = path.with_suffix(f".{again}")
        return path

    def _mark(self, entry: Path) -> None:
        beside = self.path / f"{_PARTIAL}{_LATEST}"
        _written(beside, f"{entry.name}\n".encode())
        beside.replace(self.path / _LATEST)
        _sync(self.path)

    def _prune(self, keep: int) -> None:
        for each in self.entries()[keep:]:
            # Renamed first, so that one that is half removed is not taken for a damaged one.
            removed = each.with_name(_REMOVED + each.name)
            with contextlib.suppress(OSError):
                each.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def check(entry: Path) -> None:
    """Make sure that a checkpoint is what was written.

    Raises:
        DamagedError: If a file of it is missing, cut short or changed.
        OSError: If it cannot be read.
    """
    try:
        files = json.loads((entry / _MANIFEST).read_bytes())["files"]
        expected = {name: (int(each["bytes"]), each["sha256"]) for name, each in files.items()}
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


def _written(path: Path, content: bytes) -> dict[str, int | str]:
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
    """Make names durable: a power cut must not take them back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
