"""A file that proves success: batch scripts decide by it, since exit codes of launchers have been seen to lie."""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from hvdtrain.launch.hosts import LaunchError


class DoneFile:
    """Appears only when every rank has shown that its script came to its end.

    Args:
        path: Where.

    Raises:
        LaunchError: If it could not be written later.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        self._started = time.time()
        try:
            self._path.unlink(missing_ok=True)
            self._beside.write_text("")
            self._beside.unlink()
        except OSError as error:
            raise LaunchError(f"--done-file {path} cannot be written: {error.strerror}.") from error

    def write(self, hosts: Sequence[str]) -> None:
        """Write who has done the work and how long it took, at once or not at all."""
        facts = {
            "ranks": len(hosts),
            "hosts": sorted(set(hosts)),
            "started": round(self._started, 3),
            "seconds": round(time.time() - self._started, 3),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }
        try:
            with self._beside.open("w") as file:
                file.write(json.dumps(facts) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._beside.replace(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._beside.unlink()
            raise LaunchError(
                f"every rank has done its work, but --done-file {self._path} cannot be written: {error.strerror}."
            ) from error
