"""A checkpoint as it was found: rank 0 reads it, and each rank gets its part."""

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
VARIABLE = "variable/"  # how the names of variables begin, which travel apart from other values

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Place:
    """Where a training is.

    Args:
        epoch: The epoch, counted from 0.
        step: Its steps that are done.
        total: Steps done over all epochs.
        steps: Steps of an epoch, if known.
        finished: Whether `fit` has come to its end.
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
    """What a rank goes on from.

    Args:
        entry: The checkpoint's folder, which only rank 0 need be able to read.
        place: Where the training was.
        facts: What else `state.json` says.
        common: Plain values of rank 0, on all ranks those that are no variables.
        own: In which this rank was different.
    """

    entry: Path
    place: Place
    facts: Mapping[str, Any]
    common: Mapping[str, Any] = field(repr=False)
    own: Mapping[str, Any] = field(repr=False)

    @property
    def values(self) -> dict[str, Any]:
        """This rank's values by their names."""
        return {**self.common, **self.own}

    def under(self, prefix: str) -> dict[str, Any]:
        """Return this rank's values whose names begin so, without that beginning."""
        found = self.values.items()
        return {name.removeprefix(prefix): value for name, value in found if name.startswith(prefix)}


def read(entry: Path | None, engine: Engine) -> Saved | None:
    """Give every rank its part of a checkpoint.

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
    """Make the files of a checkpoint that `read` understands, beside the model's own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for rank, part in enumerate(parts):
            file.writestr(f"rank-{rank:05d}.npz", part)
    text = json.dumps({"format": 1, "place": vars(place), "ranks": len(parts), **facts}, indent=1)
    return {FACTS: text.encode(), RANKS: buffer.getvalue()}


def gathered(content: bytes, engine: Engine) -> list[bytes]:
    """Return what each rank passes, on the first rank; on the others nothing."""
    size = engine.size
    received, counts = engine.alltoall(np.frombuffer(content, np.uint8), [len(content)] + [0] * (size - 1))
    return _cut(received, counts) if engine.rank == engine.ranks[0] else []


def scattered(contents: list[bytes], engine: Engine) -> bytes:
    """Return this rank's part of what the first rank passes, a part for each rank after it."""
    parts = [b"", *contents, *[b""] * engine.size][: engine.size] if contents else [b""] * engine.size
    received, _ = engine.alltoall(np.frombuffer(b"".join(parts), np.uint8), [len(each) for each in parts])
    return received.tobytes()


def _parts(entry: Path) -> list[bytes]:
    with zipfile.ZipFile(entry / RANKS) as file:
        return [file.read(name) for name in sorted(file.namelist())]


def _cut(received: np.ndarray, counts: np.ndarray) -> list[bytes]:
    ends = np.cumsum(counts)
    return [received[end - count : end].tobytes() for count, end in zip(counts, ends, strict=True)]
