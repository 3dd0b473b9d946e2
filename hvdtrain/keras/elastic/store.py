"""Store the last commit on disk, complete or absent, in a file that belongs to one training only."""

import hashlib
import os
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hvdtrain import settings

_HEAD = b"hvdtrain elastic 1\n"


@dataclass(frozen=True)
class Snapshot:
    """The content of a commit.

    Args:
        values: The attributes of the state, by name.
        described: A line for each variable that all ranks share: name, dtype, shape.
        arrays: The values of these variables.
        own: For each rank the values that belong to it alone.
    """

    values: dict[str, Any]
    described: tuple[str, ...] = ()
    arrays: Sequence[np.ndarray] = ()
    own: Sequence[Any] = field(default_factory=list)


class Store:
    """The file of the last commit, which rank 0 reads and writes.

    Args:
        path: Path of the file; its folder is created when needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, function: str, number: int) -> "Store":
        """Return the store for a call of a function in this script with its arguments.

        Args:
            function: Name of the function.
            number: Number of earlier calls.
        """
        folder = Path(settings.get("HVDTRAIN_ELASTIC_DIR")).absolute()
        script = Path(sys.argv[0] or "interactive").absolute()
        identity = "\0".join([str(script), *sys.argv[1:], function, str(number)])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
        return cls(folder / f"{script.stem}-{digest}.state")

    def read(self) -> Snapshot | None:
        """Return the last commit, or None if there is none.

        Raises:
            ValueError: If the file is damaged.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        digest, body = content[len(_HEAD) : len(_HEAD) + 32], content[len(_HEAD) + 32 :]
        if not content.startswith(_HEAD) or hashlib.sha256(body).digest() != digest:
            raise ValueError(
                f"The last commit in {self.path} is damaged: its checksum is wrong. Remove the file to start from "
                "the beginning."
            )
        return pickle.loads(body)

    def write(self, snapshot: Snapshot) -> None:
        """Replace the previous commit; if the process dies meanwhile, one of the two is complete.

        Raises:
            TypeError: If an attribute of the state cannot be pickled.
            OSError: If the file cannot be written.
        """
        body = _pickled(snapshot)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(_HEAD + hashlib.sha256(body).digest())
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name survives a power failure
        finally:
            os.close(folder)

    def remove(self) -> None:
        """Remove the commit, and the folder if it is empty."""
        self.path.unlink(missing_ok=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


def _pickled(snapshot: Snapshot) -> bytes:
    try:
        return pickle.dumps(snapshot, protocol=5)
    except Exception as error:
        failing = next((name for name, value in snapshot.values.items() if not _can_pickle(value)), "?")
        raise TypeError(
            f"The state cannot be committed to disk: its attribute {failing!r} cannot be pickled ({error}). "
            "Keep plain values in the state: numbers, strings, arrays, lists and dictionaries of them."
        ) from error


def _can_pickle(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True
