"""The last commit on disk: written whole or not at all, and never taken for that of another training."""

import hashlib
import os
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_HEAD = b"hvdtrain elastic 1\n"


@dataclass(frozen=True)
class Snapshot:
    """What a commit holds.

    Args:
        values: The attributes of the state, by name.
        described: A line for each variable that all ranks share: name, dtype, shape.
        arrays: The values of these variables.
        own: For each rank what belongs to it alone.
    """

    values: dict[str, Any]
    described: tuple[str, ...] = ()
    arrays: Sequence[np.ndarray] = ()
    own: Sequence[Any] = field(default_factory=list)


class Store:
    """One file, which rank 0 reads and writes.

    Args:
        path: Where it is; the folder is made when first needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, function: str, number: int) -> "Store":
        """Return the store of one call of one function in this run of this script with these arguments.

        Args:
            function: Name of the function.
            number: How many times it was called before.
        """
        folder = Path(os.environ.get("HVDTRAIN_ELASTIC_DIR") or ".hvdtrain_elastic").absolute()
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
                f"The last commit in {self.path} is damaged: its checksum is wrong. Remove the file to start anew."
            )
        return pickle.loads(body)

    def write(self, snapshot: Snapshot) -> None:
        """Replace the commit before by this one; whenever the process dies, one of the two is there, whole.

        Raises:
            TypeError: If an attribute of the state cannot be pickled.
            OSError: If the file cannot be written.
        """
        body = _pickled(snapshot)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".partial")
        with beside.open("wb") as file:
            file.write(_HEAD + hashlib.sha256(body).digest())
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, must survive a power cut
        finally:
            os.close(folder)

    def remove(self) -> None:
        """Forget the commit, and the folder if nothing else is in it."""
        self.path.unlink(missing_ok=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


def _pickled(snapshot: Snapshot) -> bytes:
    try:
        return pickle.dumps(snapshot, protocol=5)
    except Exception as error:
        unfit = next((name for name, value in snapshot.values.items() if not _can_pickle(value)), "?")
        raise TypeError(
            f"The state cannot be committed to disk, because its attribute {unfit!r} cannot be pickled ({error}). "
            "Keep plain values in the state: numbers, strings, arrays, lists and dictionaries of them."
        ) from error


def _can_pickle(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True
