"""Which cores a rank may use: an equal share of its host's for each, where there is one for each.

The rank does this itself rather than ask mpirun for it. So it is the same under every MPI, sees the
cores that this host and this cgroup really offer, and cannot make a start fail.
"""

import os
from collections.abc import Sequence
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")

# Makes MPI give up the core while it waits; each library reads its own name.
YIELDING = {"OMPI_MCA_mpi_yield_when_idle": "1", "I_MPI_THREAD_YIELD": "3"}

Core = tuple[int, ...]


def cores() -> list[Core]:
    """List the physical cores open to this process, each as its hardware threads, neighbours together."""
    found: dict[tuple[int, Core], set[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        found.setdefault(_home(cpu), set()).add(cpu)
    return [tuple(sorted(threads)) for _, threads in sorted(found.items())]


def share(all_cores: Sequence[Core], rank: int, ranks: int, bind: str) -> set[int] | None:
    """Return which hardware threads belong to one of several ranks on a host.

    Args:
        all_cores: What `cores()` lists.
        rank: The local rank.
        ranks: How many ranks share the host.
        bind: "auto" for an equal share, "core" for one core, "none" for no binding.

    Returns:
        The hardware threads, or None where the rank is better left to roam.
    """
    each = len(all_cores) // ranks
    if bind == "none" or each == 0 or (bind == "auto" and ranks == 1):
        return None
    if bind == "core":
        each = 1
    return {thread for core in all_cores[rank * each : (rank + 1) * each] for thread in core}


def should_yield(threads: int, ranks: int) -> bool:
    """Return whether waiting inside MPI must give up the core, because a rank has less than two."""
    return threads < 2 * ranks


def _home(cpu: int) -> tuple[int, Core]:
    """Find a CPU's socket and sibling threads; one that the kernel does not describe stands alone."""
    topology = CPUS / f"cpu{cpu}" / "topology"
    try:
        socket = int((topology / "physical_package_id").read_text())
        return socket, _numbers((topology / "thread_siblings_list").read_text())
    except (OSError, ValueError):
        return 0, (cpu,)


def _numbers(text: str) -> Core:
    """Read the kernel's '0-1,64' form."""
    ends = [part.split("-") for part in text.strip().split(",")]
    return tuple(number for pair in ends for number in range(int(pair[0]), int(pair[-1]) + 1))
