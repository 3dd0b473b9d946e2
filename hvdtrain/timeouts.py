"""Read the time limits after which waiting ranks are reported and the job is ended."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdtrain import settings


@dataclass(frozen=True)
class Limits:
    """Time limits for ranks that wait for one another.

    Args:
        report: Seconds after which a message says which rank waits for which; 0 is never.
        abort: Seconds after which the job is ended; 0 is never.
    """

    report: float = 60.0
    abort: float = 600.0

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> "Limits":
        """Read HVDTRAIN_STALL_SECONDS and HVDTRAIN_STALL_ABORT_SECONDS.

        Raises:
            ValueError: If one of them is not a number of seconds.
        """
        report = _seconds(environ, "HVDTRAIN_STALL_SECONDS")
        abort = _seconds(environ, "HVDTRAIN_STALL_ABORT_SECONDS")
        return cls(report, max(abort, report) if abort else 0.0)

    @property
    def interval(self) -> float:
        """The interval in seconds at which a guard checks its rank."""
        return min(max(self.report / 4, 0.2), 5.0) if self.report else 5.0


def stack_file(whose: str = "") -> Path:
    """Return the file for the stacks of a job that hangs, in HVDTRAIN_STALL_DIR or the working directory.

    Args:
        whose: Part of the file name that distinguishes ranks.
    """
    folder = Path(settings.get("HVDTRAIN_STALL_DIR"))
    return folder.absolute() / f"hvdtrain-stall-{os.environ.get('SLURM_JOB_ID') or os.getpid()}{whose}.txt"


def _seconds(environ: Mapping[str, str], name: str) -> float:
    given, default = settings.get(name, environ), settings.get(name, {})
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(
            f"{name} must be a number of seconds, 0 for never. Received: {given!r}. The default is {default}."
        )
    return seconds
