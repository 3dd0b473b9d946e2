"""How many cores one rank may use: affinity, container and Slurm limits, and the ranks it shares them with."""

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def allowed() -> frozenset[int]:
    """Returns the cores on which the scheduler lets this process run."""
    return frozenset(os.sched_getaffinity(0))


def granted(environ: Mapping[str, str] = os.environ) -> int | None:
    """Returns how many cores Slurm gave each rank (`-c`), or None where it does not say."""
    text = environ.get("SLURM_CPUS_PER_TASK", "")
    return int(text) if text.isdigit() and int(text) else None


def model() -> str:
    """Names the processors of this host, as the kernel does."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Returns how many cores' time the container may spend, or None if nothing limits it.

    Args:
        root: Where the control groups are mounted; version 2 (cpu.max) and 1 (cpu.cfs_quota_us) are read.
    """
    limits = []
    for file in (root / "cpu.max", root / "cpu" / "cpu.cfs_quota_us"):
        try:
            fields = file.read_text().split()
            period = fields[1] if len(fields) > 1 else file.with_name("cpu.cfs_period_us").read_text()
            limits.append(int(fields[0]) / int(period))
        except (OSError, ValueError, IndexError):  # absent, or "max": no limit
            continue
    return min((limit for limit in limits if limit > 0), default=None)


def share(mine: frozenset[int], neighbours: Sequence[Iterable[int]], container: float | None) -> int:
    """Divides the cores of a host fairly among its ranks.

    Args:
        mine: The cores on which this rank may run.
        neighbours: The cores of each rank on this host, this one included. Ranks bound to cores of their
            own share nothing; ranks that may all run anywhere get equal parts.
        container: How many cores' time all ranks of this host may spend together, if limited.

    Returns:
        How many threads this rank should compute with; at least 1.
    """
    sets = [frozenset(each) for each in neighbours]
    fair = sum(1 / sum(core in each for each in sets) for core in mine)
    if container is not None:
        fair = min(fair, container / len(sets))
    return max(1, int(fair + 1e-9))
