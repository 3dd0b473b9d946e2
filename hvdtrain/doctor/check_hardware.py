"""Check what this host has: cores, GPUs, memory shared between ranks, and memory locked for the network adapter."""

import math
import re
import resource
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdtrain import cores as core_limits
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.probe_runner import ProbeError, ProbeRunner

THREAD_SETTINGS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
GPU_TENSORFLOW = "pip install 'tensorflow[and-cuda]'"
MIB = 1 << 20
SHM = Path("/dev/shm")
DOCKER_DEFAULT = 64 * MIB
LEAST_FREE = 16 * MIB  # a few ranks need this much for their shared memory segments
LEAST_LOCKED = 64 * MIB
ADAPTERS = Path("/sys/class/infiniband")


def cores(environ: Mapping[str, str]) -> Finding:
    """Return the number of cores and threads for ranks on this host."""
    return judge_cores(len(core_limits.allowed()), core_limits.quota(), environ)


def judge_cores(affinity: int, quota: float | None, environ: Mapping[str, str]) -> Finding:
    """Judge the CPU affinity, the container's quota in cores, and the variables of Slurm and the user together."""
    usable = affinity if quota is None else max(1, min(affinity, math.floor(quota)))
    ranks = f"{_count(usable, 'rank')} with one thread each, or fewer ranks with more"
    found = f"{_count(usable, 'core')} here: {ranks}"
    if quota is not None and quota < affinity:
        found += f" ({affinity} are visible, but the container grants the time of {quota:g})"
    granted = core_limits.granted(environ)
    if granted:
        found += f"; Slurm gives each task {_count(granted, 'CPU')}"
    chosen = {name: environ[name] for name in THREAD_SETTINGS if environ.get(name, "").isdigit()}
    named = ", ".join(f"{name}={value}" for name, value in chosen.items())
    if any(int(value) > usable for value in chosen.values()):
        problem = f"{found}. But {named} asks for more than there are."
        return note("Cores and threads", problem, f"unset {' '.join(chosen)}")
    return ok("Cores and threads", f"{found}; {named} stays as you set it" if named else found)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def gpus(probes: ProbeRunner) -> Finding:
    """Compare the driver's GPUs with those that TensorFlow sees."""
    result = probes.run(*GPU_QUERY)
    cards = result.out.strip().splitlines() if result.code == 0 else []
    failure = result.last_line if result.code not in (0, 127) else ""
    try:
        stack = probes.stack
    except ProbeError:
        stack = {}
    return judge_gpus(cards, failure, stack, probes.environ)


def judge_gpus(
    cards: Sequence[str], failure: str, stack: Mapping[str, Any], environ: Mapping[str, str]
) -> Finding:
    """Judge the GPUs of this host.

    Args:
        cards: One line of `nvidia-smi` for each GPU; empty without nvidia-smi.
        failure: The error of nvidia-smi; empty if it did not fail.
        stack: What TensorFlow reports: the list `gpus`, and whether it was built with `cuda`.
        environ: The environment variables, of which CUDA_VISIBLE_DEVICES is read.
    """
    seen = len(stack.get("gpus", ()))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    setting = "" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible!r}"
    if failure:
        fix = "modprobe nvidia   # as root, or ask the administrator of this machine"
        return note("GPUs", f"nvidia-smi fails: {failure}. TensorFlow sees {seen}{setting}.", fix)
    if not cards and not seen:
        return ok("GPUs", f"none here; training runs on the cores{setting}")
    models = Counter(card.strip() for card in cards)
    listed = ", ".join(f"{count} x {model}" for model, count in models.items()) or "no nvidia-smi"
    found = f"{listed}; TensorFlow sees {seen}{setting}"
    expected = len(cards) if visible is None else min(len(cards), len(re.findall(r"[^,\s]+", visible)))
    if seen >= expected and seen > 0:
        return ok("GPUs", f"{found}; one rank a GPU: hvdtrain run -np {seen}")
    if not stack.get("cuda"):
        return note("GPUs", f"{found}: this TensorFlow was built without CUDA.", GPU_TENSORFLOW)
    if visible is not None:
        return note("GPUs", f"{found}: CUDA_VISIBLE_DEVICES hides some.", "unset CUDA_VISIBLE_DEVICES")
    return note("GPUs", f"{found}: it does not find its CUDA libraries.", GPU_TENSORFLOW)


def shared_memory() -> Finding:
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
    if free < LEAST_FREE:
        full = total >= LEAST_FREE
        fix = "ls -l /dev/shm   # and remove files of ended jobs" if full else larger
        return wrong("Shared memory", f"{found}: MPI's segments do not fit.", fix)
    if total <= DOCKER_DEFAULT:
        return note("Shared memory", f"{found}, Docker's default: many ranks may die of a bus error.", larger)
    return ok("Shared memory", found)


def locked_memory() -> Finding:
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
