"""Compute which cores and how many threads a rank may use, from CPU affinity, limits and its neighbours.

A rank binds itself to its cores; mpirun is not asked to. So binding works in the same way under every MPI, uses the
cores that this host and this cgroup really offer, and cannot make a start fail.
"""

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

# Variables that make MPI yield the core while it waits; each MPI reads its own.
YIELDING = {"OMPI_MCA_mpi_yield_when_idle": "1", "I_MPI_THREAD_YIELD": "3"}

Core = tuple[int, ...]


def allowed() -> frozenset[int]:
    """Return the hardware threads on which this process may run (its CPU affinity)."""
    return frozenset(os.sched_getaffinity(0))


def physical() -> list[Core]:
    """Return the physical cores that this process may use, each as its hardware threads, ordered by socket."""
    found: dict[tuple[int, Core], set[int]] = {}
    for cpu in sorted(allowed()):
        found.setdefault(_location(cpu), set()).add(cpu)
    return [tuple(sorted(threads)) for _, threads in sorted(found.items())]


def of_rank(cores: Sequence[Core], rank: int, ranks: int, bind: str) -> set[int] | None:
    """Return the hardware threads to which one of several ranks on a host is bound.

    Args:
        cores: The result of `physical()`.
        rank: The local rank.
        ranks: The number of ranks on the host.
        bind: "auto" for an equal share, "core" for one core, "none" for no binding.

    Returns:
        The hardware threads, or None if the rank should not be bound.
    """
    per_rank = len(cores) // ranks
    if bind == "none" or per_rank == 0 or (bind == "auto" and ranks == 1):
        return None
    if bind == "core":
        per_rank = 1
    mine = cores[rank * per_rank : (rank + 1) * per_rank]
    return {thread for core in mine for thread in core}


def should_yield(ranks: int) -> bool:
    """Return whether MPI must yield the core while it waits, because a rank has less than two hardware threads."""
    return len(allowed()) < 2 * ranks


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
    """Return the number of threads with which this rank should compute; at least 1.

    Args:
        mine: The cores on which this rank may run.
        neighbours: The cores of each rank on this host, including this rank. Ranks bound to different cores
            share nothing; ranks that may all run anywhere get equal parts.
        container: CPU quota of all ranks of this host together, in cores; None if there is no limit.
    """
    core_sets = [frozenset(cores) for cores in neighbours]
    fair = 0.0
    for core in mine:
        users = sum(core in cores for cores in core_sets)
        fair += 1 / users
    if container is not None:
        fair = min(fair, container / len(core_sets))
    return max(1, int(fair + 1e-9))  # 1/3 + 1/3 + 1/3 may be just below 1


def read_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a set such as "0-2,7", as the kernel and Flux write it."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def _location(cpu: int) -> tuple[int, Core]:
    """Return a CPU's socket and sibling threads; (0, (cpu,)) if the kernel does not describe it."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        socket = int((topology / "physical_package_id").read_text())
        return socket, read_numbers((topology / "thread_siblings_list").read_text())
    except (OSError, ValueError):
        return 0, (cpu,)
