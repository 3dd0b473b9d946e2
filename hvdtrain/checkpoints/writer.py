"""Writes checkpoints while training goes on."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hvdtrain.checkpoints.folder import Folder

Files = Mapping[str, bytes]


class Writer:
    """One thread that writes one checkpoint after another, so that at most one is kept in memory.

    Args:
        folder: Where they go.
        keep: How many stay.
    """

    def __init__(self, folder: Folder, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "hvdtrain-checkpoint")
        self._step = 0
        self._pending: Future[Path] | None = None
        self.newest: Path | None = None

    def submit(self, step: int, make: Callable[[], Files]) -> str | None:
        """Let a checkpoint written, once the one before is.

        Args:
            step: By which it is named.
            make: Makes its files, in the thread.

        Returns:
            Why the one before could not be written, or None if it was.
        """
        failure = self.wait()
        self._step = step
        self._pending = self._thread.submit(lambda: self._folder.write(step, make(), self._keep))
        return failure

    def wait(self) -> str | None:
        """Wait until all is written; returns why the last one could not be, or None."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            self.newest = pending.result()
        except Exception as error:
            there = self.newest is not None and self.newest.exists()
            kept = f"the last whole one is {self.newest}" if there else "there is none before it"
            return f"the checkpoint of step {self._step} could not be written ({error}); {kept}."
        return None

    def close(self) -> str | None:
        """Wait, and ends the thread."""
        failure = self.wait()
        self._thread.shutdown()
        return failure
