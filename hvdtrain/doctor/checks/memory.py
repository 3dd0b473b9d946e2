"""Check the memory that MPI needs: shared between ranks, and locked for the network adapter."""

import resource
import shutil
from pathlib import Path

from hvdtrain.doctor.finding import Finding, note, ok, wrong

MIB = 1 << 20
SHM = Path("/dev/shm")
DOCKER_DEFAULT = 64 * MIB
LEAST_FREE = 16 * MIB  # a few ranks need this much for their shared memory segments
LEAST_LOCKED = 64 * MIB
ADAPTERS = Path("/sys/class/infiniband")


def shared() -> Finding:
    """Check the free space of /dev/shm, through which ranks of one host exchange gradients."""
    if not SHM.is_dir():
        found = "There is no /dev/shm: ranks of one host communicate more slowly."
        return note("Shared memory", found, "mount -t tmpfs tmpfs /dev/shm")
    usage = shutil.disk_usage(SHM)
    return judge_shared(usage.total, usage.free)


def judge_shared(total: int, free: int) -> Finding:
    """Judge the size and the free space of /dev/shm, in bytes."""
    found = f"/dev/shm has {_size(free)} free of {_size(total)}"
    larger = "mount -o remount,size=2g /dev/shm   # as root; or docker run --shm-size=2g"
    if free < LEAST_FREE <= total:
        return wrong(
            "Shared memory",
            f"{found}: MPI's segments do not fit.",
            "ls -l /dev/shm   # and remove files of ended jobs",
        )
    if free < LEAST_FREE:
        return wrong("Shared memory", f"{found}: MPI's segments do not fit.", larger)
    if total <= DOCKER_DEFAULT:
        return note("Shared memory", f"{found}, Docker's default: many ranks may die of a bus error.", larger)
    return ok("Shared memory", found)


def locked() -> Finding:
    """Check how much memory a process may lock; InfiniBand can only access locked memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = sorted(path.name for path in ADAPTERS.iterdir()) if ADAPTERS.is_dir() else []
    return judge_locked(None if soft == resource.RLIM_INFINITY else soft, adapters)


def judge_locked(limit: int | None, adapters: list[str]) -> Finding:
    """Judge `ulimit -l`, in bytes or None for no limit, for the InfiniBand adapters of this host."""
    found = f"ulimit -l is {'unlimited' if limit is None else _size(limit)}"
    if not adapters:
        return ok("Locked memory", f"{found}; no InfiniBand here, so it does not matter")
    found += f", with InfiniBand ({', '.join(adapters)})"
    fix = "ulimit -l unlimited   # as root for all: echo '* - memlock unlimited' >> /etc/security/limits.conf"
    if limit is None:
        return ok("Locked memory", found)
    if limit < LEAST_LOCKED:
        return wrong("Locked memory", f"{found}: MPI cannot register its buffers.", fix)
    return note("Locked memory", f"{found}: MPI may be unable to register the buffers of large models.", fix)


def _size(size: int) -> str:
    return f"{size / MIB:.0f} MiB" if size < 1 << 30 else f"{size / (1 << 30):.1f} GiB"
