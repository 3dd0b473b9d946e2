"""Choose the cores of a rank: an equal share of the cores of its host, if there is at least one for each rank.

The rank binds itself; mpirun is not asked to. So binding works in the same way under every MPI, uses the cores that
this host and this cgroup really offer, and cannot make a start fail.
"""

import os
from collections.abc import Sequence
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")

# Variables that make MPI yield the core while it waits; each MPI reads its own.
YIELDING = {"OMPI_MCA_mpi_yield_when_idle": "1", "I_MPI_THREAD_YIELD": "3"}

Core = tuple[int, ...]


def cores() -> list[Core]:
    """Return the physical cores that this process may use, each as its hardware threads, ordered by socket."""
    found: dict[tuple[int, Core], set[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        found.setdefault(_location(cpu), set()).add(cpu)
    return [tuple(sorted(threads)) for _, threads in sorted(found.items())]


def share(all_cores: Sequence[Core], rank: int, ranks: int, bind: str) -> set[int] | None:
    """Return the hardware threads of one of several ranks on a host.

    Args:
        all_cores: The result of `cores()`.
        rank: The local rank.
        ranks: The number of ranks on the host.
        bind: "auto" for an equal share, "core" for one core, "none" for no binding.

    Returns:
        The hardware threads, or None if the rank should not be bound.
    """
    per_rank = len(all_cores) // ranks
    if bind == "none" or per_rank == 0 or (bind == "auto" and ranks == 1):
        return None
    if bind == "core":
        per_rank = 1
    mine = all_cores[rank * per_rank : (rank + 1) * per_rank]
    return {thread for core in mine for thread in core}


def should_yield(threads: int, ranks: int) -> bool:
    """Return whether MPI must yield the core while it waits, because a rank has less than two hardware threads."""
    return threads < 2 * ranks


def _location(cpu: int) -> tuple[int, Core]:
    """Return a CPU's socket and sibling threads; (0, (cpu,)) if the kernel does not describe it."""
    topology = CPUS / f"cpu{cpu}" / "topology"
    try:
        socket = int((topology / "physical_package_id").read_text())
        return socket, _numbers((topology / "thread_siblings_list").read_text())
    except (OSError, ValueError):
        return 0, (cpu,)


def _numbers(text: str) -> Core:
    """Read the kernel's '0-1,64' form."""
    ranges = [part.split("-") for part in text.strip().split(",")]
    return tuple(number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1))
