"""Write checkpoints in a thread, while training continues."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hvdtrain.checkpoints.folder import Folder

Files = Mapping[str, bytes]


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
