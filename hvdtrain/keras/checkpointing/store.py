"""Open and write the folder of a training's checkpoints on the first rank."""

from collections.abc import Callable
from pathlib import Path

from hvdtrain.checkpoints.folder import Files, Folder, Writer
from hvdtrain.checkpoints.lock import Lock
from hvdtrain.collectives.engine import Engine


class Store:
    """The checkpoints of a training; on ranks other than the first it does nothing.

    Args:
        path: The folder.
        keep: Number of checkpoints to keep.
        engine: The ranks; the first one prints warnings.
    """

    def __init__(self, path: Path, keep: int, engine: Engine) -> None:
        self._path, self._keep, self._engine = path, keep, engine
        self._writer: Writer | None = None
        self._lock: Lock | None = None

    def open(self) -> Path | None:
        """Lock the folder for this training.

        Returns:
            The newest complete checkpoint in it, or None.

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
                f"{self._path} is on a file system without locks, so a second job could use it at the same time."
            )
        self._writer = Writer(folder, self._keep)
        entry, complaints = folder.newest_whole()
        for complaint in complaints:
            instead = (
                f"{entry} is used instead"
                if entry
                else "There is no other, so training starts from the beginning"
            )
            self._warn(f"{complaint} {instead}.")
        self._writer.newest = entry
        return entry

    def submit(self, step: int, make: Callable[[], Files] | None) -> None:
        """Write a checkpoint in the background, and warn if the previous one could not be written."""
        if self._writer and make:
            self._warn(self._writer.submit(step, make))

    def settle(self) -> tuple[Path | None, str | None]:
        """Wait until the last checkpoint is written; all ranks call this.

        Returns:
            The newest checkpoint, and why a newer one could not be written.
        """
        failure = self._writer.wait() if self._writer else None
        newest = self._writer.newest if self._writer else None
        return self._engine.broadcast_object((newest, failure), self._engine.ranks[0])

    def close(self) -> None:
        """Wait, warn if the last checkpoint could not be written, and release the folder."""
        if self._writer:
            self._warn(self._writer.close())
        if self._lock:
            self._lock.release()

    def _warn(self, message: str | None) -> None:
        if message:
            self._engine.warn(message)
