"""The folder of a training's checkpoints, which only the first rank touches."""

from collections.abc import Callable
from pathlib import Path

from hvdtrain.checkpoints.folder import Folder
from hvdtrain.checkpoints.lock import Lock
from hvdtrain.checkpoints.writer import Files, Writer
from hvdtrain.collectives.engine import Engine


class Store:
    """Finds, writes and keeps checkpoints; on other ranks than the first it does nothing.

    Args:
        path: The folder.
        keep: How many checkpoints stay.
        engine: The ranks; the first one tells what goes wrong.
    """

    def __init__(self, path: Path, keep: int, engine: Engine) -> None:
        self._path, self._keep, self._engine = path, keep, engine
        self._writer: Writer | None = None
        self._lock: Lock | None = None

    def open(self) -> Path | None:
        """Take the folder for this training.

        Returns:
            The newest whole checkpoint in it, if there is one.

        Raises:
            InUseError: If another training uses it.
            OSError: If it cannot be written to.
        """
        if self._engine.rank != self._engine.ranks[0]:
            return None
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
                f"{self._path} is on a file system without locks, so nothing keeps a second job from it."
            )
        self._writer = Writer(folder, self._keep)
        entry, complaints = folder.newest_whole()
        for each in complaints:
            instead = (
                f"{entry} is taken in its place" if entry else "There is no other, so training begins anew"
            )
            self._warn(f"{each} {instead}.")
        self._writer.newest = entry
        return entry

    def submit(self, step: int, make: Callable[[], Files] | None) -> None:
        """Let a checkpoint written in the background, and tells if the one before could not be."""
        if self._writer and make:
            self._warn(self._writer.submit(step, make))

    def settle(self) -> tuple[Path | None, str | None]:
        """Wait until all is written; all ranks call this.

        Returns:
            The newest checkpoint, and why a newer one could not be written.
        """
        failure = self._writer.wait() if self._writer else None
        newest = self._writer.newest if self._writer else None
        return self._engine.broadcast_object((newest, failure), self._engine.ranks[0])

    def close(self) -> None:
        """Wait, tells what could not be written, and gives the folder back."""
        if self._writer:
            self._warn(self._writer.close())
        if self._lock:
            self._lock.give_back()

    def _warn(self, words: str | None) -> None:
        if words:
            self._engine.say(f"warning: {words}")
