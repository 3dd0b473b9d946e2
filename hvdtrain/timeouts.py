"""How long ranks may wait for one another before something is said and done, and where that is written down."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """How long ranks may wait for one another.

    Args:
        report: After how many seconds it is said who waits for whom; 0 is never.
        abort: After how many the job is ended; 0 is never.
    """

    report: float = 60.0
    abort: float = 600.0

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> "Limits":
        """Reads HVDTRAIN_STALL_SECONDS and HVDTRAIN_STALL_ABORT_SECONDS.

        Raises:
            ValueError: If one of them is no number of seconds.
        """
        report = _seconds(environ, "HVDTRAIN_STALL_SECONDS", cls.report)
        abort = _seconds(environ, "HVDTRAIN_STALL_ABORT_SECONDS", cls.abort)
        return cls(report, max(abort, report) if abort else 0.0)

    @property
    def interval(self) -> float:
        """How often a guard looks at its rank, in seconds."""
        return min(max(self.report / 4, 0.2), 5.0) if self.report else 5.0


def stack_file(whose: str = "") -> Path:
    """Returns where the stacks of a job that hangs go: into HVDTRAIN_STALL_DIR, or the working directory.

    Args:
        whose: What tells the files of several ranks apart.
    """
    folder = Path(os.environ.get("HVDTRAIN_STALL_DIR") or ".")
    return folder.absolute() / f"hvdtrain-stall-{os.environ.get('SLURM_JOB_ID') or os.getpid()}{whose}.txt"


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    given = environ.get(name, "").strip()
    try:
        seconds = float(given) if given else default
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(
            f"{name} must be a number of seconds, 0 for never. Received: {given!r}. The default is {default:g}."
        )
    return seconds
