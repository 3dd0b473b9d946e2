"""Compute how many cores a rank may use, from CPU affinity, container and Slurm limits and its neighbours."""

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def allowed() -> frozenset[int]:
    """Return the cores on which this process may run (its CPU affinity)."""
    return frozenset(os.sched_getaffinity(0))


def granted(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return how many cores Slurm gives each rank (`-c`), or None if that is not set."""
    text = environ.get("SLURM_CPUS_PER_TASK", "")
    return int(text) if text.isdigit() and int(text) else None


def model() -> str:
    """Return the model name of this host's processors, from /proc/cpuinfo."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return the CPU quota of the container in cores, or None if there is no limit.

    Args:
        root: Mount point of the control groups; version 2 (cpu.max) and 1 (cpu.cfs_quota_us) are read.
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
    """Divide the cores of a host among its ranks.

    Args:
        mine: The cores on which this rank may run.
        neighbours: The cores of each rank on this host, including this rank. Ranks bound to different cores
            share nothing; ranks that may all run anywhere get equal parts.
        container: CPU quota of all ranks of this host together, in cores; None if there is no limit.

    Returns:
        The number of threads with which this rank should compute; at least 1.
    """
    core_sets = [frozenset(cores) for cores in neighbours]
    fair = 0.0
    for core in mine:
        users = sum(core in cores for cores in core_sets)
        fair += 1 / users
    if container is not None:
        fair = min(fair, container / len(core_sets))
    return max(1, int(fair + 1e-9))  # 1/3 + 1/3 + 1/3 may be just below 1
