"""Read a checkpoint on the first rank and send each rank its part; make the files of a checkpoint."""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hvdtrain.checkpoints import plain
from hvdtrain.collectives.engine import Engine

FACTS, RANKS = "state.json", "ranks.zip"
VARIABLE = "variable/"  # prefix of the names of variables, which are not broadcast with other values

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Place:
    """The position of a training.

    Args:
        epoch: The epoch, counted from 0.
        step: Number of its steps that are done.
        total: Steps done over all epochs.
        steps: Steps of an epoch, if known.
        finished: Whether `fit` has ended.
        stopped: Whether it ended before its last epoch, as EarlyStopping does.
    """

    epoch: int = 0
    step: int = 0
    total: int = 0
    steps: int | None = None
    finished: bool = False
    stopped: bool = False

    def __str__(self) -> str:
        within = f", step {self.step}{f' of {self.steps}' if self.steps else ''}" if self.step else ""
        return f"epoch {self.epoch + 1}{within} (step {self.total} in all)"


@dataclass(frozen=True)
class Saved:
    """The checkpoint from which a rank resumes.

    Args:
        entry: The checkpoint's folder; only the first rank reads it.
        place: The position of the training.
        facts: The content of `state.json`.
        common: Plain values of the first rank; on other ranks without variables.
        own: Values of this rank that differ from those of the first rank.
    """

    entry: Path
    place: Place
    facts: Mapping[str, Any]
    common: Mapping[str, Any] = field(repr=False)
    own: Mapping[str, Any] = field(repr=False)

    @property
    def values(self) -> dict[str, Any]:
        """This rank's values, by name."""
        return {**self.common, **self.own}

    def under(self, prefix: str) -> dict[str, Any]:
        """Return this rank's values whose names begin with `prefix`, by the rest of the name."""
        found = self.values.items()
        return {name.removeprefix(prefix): value for name, value in found if name.startswith(prefix)}


def read(entry: Path | None, engine: Engine) -> Saved | None:
    """Read a checkpoint and send every rank its part.

    Args:
        entry: The folder, on the first rank; None if there is none.
        engine: The ranks.

    Returns:
        The checkpoint, or None on all ranks if the first has none.
    """
    root = engine.ranks[0]
    first = engine.rank == root
    parts = _parts(entry) if first and entry else []
    common = plain.unpacked(parts[0]) if parts else {}
    others = {name: value for name, value in common.items() if not name.startswith(VARIABLE)}
    head = (entry, json.loads((entry / FACTS).read_text()), others) if first and entry else None
    head = engine.broadcast_object(head, root)
    if head is None:
        return None
    path, facts, others = head
    own = scattered(parts[1:], engine)
    return Saved(path, Place(**facts["place"]), facts, common or others, plain.unpacked(own) if own else {})


def files_of(place: Place, facts: Mapping[str, Any], parts: list[bytes]) -> Files:
    """Make the files of a checkpoint that `read` reads; the model's file is made elsewhere."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for rank, part in enumerate(parts):
            file.writestr(f"rank-{rank:05d}.npz", part)
    text = json.dumps({"format": 1, "place": vars(place), "ranks": len(parts), **facts}, indent=1)
    return {FACTS: text.encode(), RANKS: buffer.getvalue()}


def gathered(content: bytes, engine: Engine) -> list[bytes]:
    """Return on the first rank the content from each rank; on other ranks an empty list."""
    size = engine.size
    received, counts = engine.alltoall(np.frombuffer(content, np.uint8), [len(content)] + [0] * (size - 1))
    return _split(received, counts) if engine.rank == engine.ranks[0] else []


def scattered(contents: list[bytes], engine: Engine) -> bytes:
    """Return this rank's part of `contents`, which hold on the first rank a part for each later rank."""
    parts = [b"", *contents, *[b""] * engine.size][: engine.size] if contents else [b""] * engine.size
    received, _ = engine.alltoall(np.frombuffer(b"".join(parts), np.uint8), [len(part) for part in parts])
    return received.tobytes()


def _parts(entry: Path) -> list[bytes]:
    with zipfile.ZipFile(entry / RANKS) as file:
        return [file.read(name) for name in sorted(file.namelist())]


def _split(received: np.ndarray, counts: np.ndarray) -> list[bytes]:
    ends = np.cumsum(counts)
    return [received[end - count : end].tobytes() for count, end in zip(counts, ends, strict=True)]
