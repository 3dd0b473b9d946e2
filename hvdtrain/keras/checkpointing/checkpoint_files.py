"""Read and write the checkpoints of a training: the first rank has the files, and each rank gets its part."""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvdtrain.checkpoints import plain
from hvdtrain.checkpoints.folder import Files, Folder, Lock
from hvdtrain.collectives.engine import Engine
from hvdtrain.data.collective_errors import together
from hvdtrain.gradients.schemes import ERRORS

FACTS, RANKS = "state.json", "ranks.zip"
VARIABLE = "variable/"  # prefix of the names of variables, which are not broadcast with other values
SCHEME = "scheme/"  # prefix of what the schemes of optimizers remember: their number, and a name in `State`


@dataclass(frozen=True)
class Place:
    """The position of a training."""

    epoch: int = 0  # counted from 0
    step: int = 0  # steps of the epoch that are done
    total: int = 0  # steps done over all epochs
    steps: int | None = None  # steps of an epoch, if known
    finished: bool = False  # whether `fit` has ended
    stopped: bool = False  # whether it ended before its last epoch, as EarlyStopping does

    def __str__(self) -> str:
        within = f", step {self.step}{f' of {self.steps}' if self.steps else ''}" if self.step else ""
        return f"epoch {self.epoch + 1}{within} (step {self.total} in all)"


@dataclass(frozen=True)
class Saved:
    """The checkpoint from which a rank resumes."""

    entry: Path  # the checkpoint's folder, which only the first rank reads
    place: Place
    facts: Mapping[str, Any]  # the content of `state.json`
    # This rank's plain values. The first rank has all variables that are not in Keras' file, the other ranks only
    # those that differ from the first rank's.
    values: Mapping[str, Any]


class Store:
    """The checkpoints of a training. The first of the ranks in `engine` reads them, and writes them in a thread.

    One checkpoint is written after another, so that at most one is in memory.
    """

    def __init__(self, path: Path, keep: int, engine: Engine) -> None:
        self._path, self._keep, self._engine = path, keep, engine
        self._lock: Lock | None = None
        self._thread = ThreadPoolExecutor(1, "hvdtrain-checkpoint")
        self._step = 0
        self._pending: Future[Path] | None = None
        self._newest: Path | None = None

    def open(self) -> Saved | None:
        """Lock the folder, and return the newest complete checkpoint in it, or None; all ranks call this.

        Raises:
            InUseError: If another training uses it.
            OSError: If it cannot be written to.
        """
        first = self._engine.rank == self._engine.ranks[0]
        entry = together(self._engine, "Checkpoint", lambda: self._open() if first else None)
        return _read(entry, self._engine)

    def submit(self, step: int, make: Callable[[], Files] | None) -> None:
        """Start writing the files that `make` returns, and warn if the previous checkpoint could not be written."""
        self._warn(self._wait())
        if make is not None:
            self._step = step
            self._pending = self._thread.submit(lambda: Folder(self._path).write(step, make(), self._keep))

    def settle(self) -> tuple[Path | None, str | None]:
        """Wait, and return the newest checkpoint and why a newer one could not be written; all ranks call this."""
        failure = self._wait()
        return self._engine.broadcast_object((self._newest, failure), self._engine.ranks[0])

    def close(self) -> None:
        """Wait, warn if the last checkpoint could not be written, and release the folder."""
        self._warn(self._wait())
        self._thread.shutdown()
        if self._lock:
            self._lock.release()

    def _wait(self) -> str | None:
        """Wait until the last checkpoint is written; return why it could not be, or None."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            self._newest = pending.result()
        except Exception as error:
            exists = self._newest is not None and self._newest.exists()
            kept = f"the last complete one is {self._newest}" if exists else "there is no earlier one"
            return f"the checkpoint of step {self._step} could not be written ({error}); {kept}."
        return None

    def _open(self) -> Path | None:
        try:
            folder = Folder(self._path)
            self._lock = Lock(folder.path)
            folder.clean()
        except OSError as error:
            raise OSError(
                f"Checkpoints cannot be written to {self._path}: {error}. Give hvd.callbacks.Checkpoint a folder "
                "that this user may write to."
            ) from error
        if not self._lock.works:
            self._warn(
                f"{self._path} is on a file system without locks, so a second job could use it at the same time."
            )
        self._newest, complaints = folder.newest_whole()
        instead = "There is no other, so training starts from the beginning"
        if self._newest:
            instead = f"{self._newest} is used instead"
        for complaint in complaints:
            self._warn(f"{complaint} {instead}.")
        return self._newest

    def _warn(self, message: str | None) -> None:
        if message:
            self._engine.warn(message)


def files_of(place: Place, facts: Mapping[str, Any], parts: list[bytes]) -> Files:
    """Make the files of a checkpoint except the model's, from the packed values of each rank."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for rank, part in enumerate(parts):
            file.writestr(f"rank-{rank:05d}.npz", part)
    text = json.dumps({"format": 1, "place": vars(place), "ranks": len(parts), **facts}, indent=1)
    return {FACTS: text.encode(), RANKS: buffer.getvalue()}


def _read(entry: Path | None, engine: Engine) -> Saved | None:
    """Read a checkpoint that exists on the first rank, and send every rank its part."""
    parts: list[bytes] = []
    values: dict[str, Any] = {}
    head = None
    if entry is not None:
        with zipfile.ZipFile(entry / RANKS) as file:
            parts = [file.read(name) for name in sorted(file.namelist())]
        values = plain.unpacked(parts[0])
        if len(parts) != engine.size and any(map(is_error, values)):
            schemes = json.loads((entry / FACTS).read_text()).get("schemes", [])
            parts = _with_divided_errors(parts, engine.size, schemes)
            values = plain.unpacked(parts[0])
        others = {
            name: value
            for name, value in values.items()
            if not name.startswith(VARIABLE) and not is_error(name)
        }
        head = entry, json.loads((entry / FACTS).read_text()), others
    head = engine.broadcast_object(head, engine.ranks[0])
    if head is None:
        return None
    path, facts, others = head
    own = scattered([b"", *parts[1:]], engine)
    values = (values or others) | (plain.unpacked(own) if own else {})
    return Saved(path, Place(**facts["place"]), facts, values)


def is_error(name: str) -> bool:
    """Return whether a value is the error of one rank's compression, which each rank has for itself."""
    return name.startswith(SCHEME) and name.split("/")[2] + "/" == ERRORS


def _with_divided_errors(parts: list[bytes], size: int, schemes: list[dict[str, str]]) -> list[bytes]:
    """Return the parts for another number of ranks, each with the same errors, so that none is lost.

    Args:
        parts: The packed values of each rank.
        size: The new number of ranks.
        schemes: `GradientReducer.facts` of each optimizer. A sum of errors is divided among the new ranks; for a
            mean of gradients the mean of errors does not change.
    """
    values = [plain.unpacked(part) for part in parts]
    errors = {}
    for name in filter(is_error, values[0]):
        op = schemes[int(name.split("/")[1])]["op"]
        errors[name] = sum(of_rank[name] for of_rank in values) / (size if op == "sum" else len(values))
    values += [{}] * (size - len(values))
    return [plain.packed(of_rank | errors) for of_rank in values[:size]]


def gathered(content: bytes, engine: Engine) -> list[bytes]:
    """Return on the first rank the content from each rank; on other ranks an empty list."""
    splits = [len(content)] + [0] * (engine.size - 1)
    received, counts = engine.alltoall(np.frombuffer(content, np.uint8), splits)
    if engine.rank != engine.ranks[0]:
        return []
    ends = np.cumsum(counts)
    return [received[end - count : end].tobytes() for count, end in zip(counts, ends, strict=True)]


def scattered(contents: list[bytes], engine: Engine) -> bytes:
    """Return this rank's part of `contents`, which the first rank has; empty if it has none for this rank."""
    parts = [*contents, *[b""] * engine.size][: engine.size]
    received, _ = engine.alltoall(np.frombuffer(b"".join(parts), np.uint8), [len(part) for part in parts])
    return received.tobytes()
