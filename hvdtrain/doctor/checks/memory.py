"""Memory that MPI needs of the system: shared between ranks, and locked for the network adapter."""

import resource
import shutil
from pathlib import Path

from hvdtrain.doctor.finding import Finding, note, ok, wrong

MIB = 1 << 20
SHM = Path("/dev/shm")
DOCKER_DEFAULT = 64 * MIB
LEAST_FREE = 16 * MIB  # what a few ranks need for the segments through which they talk
LEAST_LOCKED = 64 * MIB
ADAPTERS = Path("/sys/class/infiniband")


def shared() -> Finding:
    """Checks the room in /dev/shm, through which ranks of one host exchange gradients."""
    if not SHM.is_dir():
        mend = "mount -t tmpfs tmpfs /dev/shm"
        return note("Shared memory", "There is no /dev/shm: ranks of one host talk more slowly.", mend)
    usage = shutil.disk_usage(SHM)
    return judge_shared(usage.total, usage.free)


def judge_shared(total: int, free: int) -> Finding:
    """Judges the size of /dev/shm and what is free of it, in bytes."""
    found = f"/dev/shm has {_size(free)} free of {_size(total)}"
    larger = "mount -o remount,size=2g /dev/shm   # as root; or docker run --shm-size=2g"
    if free < LEAST_FREE <= total:
        return wrong(
            "Shared memory",
            f"{found}: MPI's segments do not fit.",
            "ls -l /dev/shm   # and remove what is stale",
        )
    if free < LEAST_FREE:
        return wrong("Shared memory", f"{found}: MPI's segments do not fit.", larger)
    if total <= DOCKER_DEFAULT:
        return note("Shared memory", f"{found}, Docker's default: many ranks may die of a bus error.", larger)
    return ok("Shared memory", found)


def locked() -> Finding:
    """Checks how much memory may be locked, which InfiniBand needs to reach it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = sorted(path.name for path in ADAPTERS.iterdir()) if ADAPTERS.is_dir() else []
    return judge_locked(None if soft == resource.RLIM_INFINITY else soft, adapters)


def judge_locked(limit: int | None, adapters: list[str]) -> Finding:
    """Judges `ulimit -l`, in bytes or None for no limit, beside the InfiniBand adapters of this host."""
    found = f"ulimit -l is {'unlimited' if limit is None else _size(limit)}"
    if not adapters:
        return ok("Locked memory", f"{found}; no InfiniBand here, so it does not matter")
    found += f", with InfiniBand ({', '.join(adapters)})"
    mend = (
        "ulimit -l unlimited   # as root for all: echo '* - memlock unlimited' >> /etc/security/limits.conf"
    )
    if limit is None:
        return ok("Locked memory", found)
    if limit < LEAST_LOCKED:
        return wrong("Locked memory", f"{found}: MPI cannot register its buffers.", mend)
    return note("Locked memory", f"{found}: large models may not register.", mend)


def _size(size: int) -> str:
    return f"{size / MIB:.0f} MiB" if size < 1 << 30 else f"{size / (1 << 30):.1f} GiB"
