"""Describe the machine, the software and the placement of ranks, so that only comparable results are compared."""

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from hvdtrain import cores
from hvdtrain.bench.scheduler import Scheduler
from hvdtrain.collectives.mpi.library import mpi_name
from hvdtrain.launch.hosts import run_captured
from hvdtrain.launch.launchers import mpirun

_PACKAGES = {
    "tensorflow": ("tensorflow", "tensorflow-cpu", "intel-tensorflow"),
    "keras": ("keras",),
    "tf_keras": ("tf_keras",),
    "horovod": ("horovod",),
    "torch": ("torch",),
    "mpi4py": ("mpi4py",),
    "numpy": ("numpy",),
}


def describe(scheduler: Scheduler) -> dict[str, Any]:
    """Return the host that measures, the software, and the placement of the ranks.

    Args:
        scheduler: The scheduler whose ranks are described.
    """
    return {
        "host": platform.node(),
        "cpu": cores.model(),
        "cores": len(cores.physical()),
        "quota": cores.quota(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "mpi": _mpi(),
        **{name: version for name, packages in _PACKAGES.items() if (version := _version(packages))},
        "hosts": scheduler.hosts,
        "pinned": scheduler.pinned,
    }


def summary(machine: Mapping[str, Any]) -> str:
    """Return the hardware and the software as one line."""
    hardware = f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']:g} GiB"
    software = [str(machine["mpi"])] if "mpi" in machine else []
    for name in ("tensorflow", "keras", "horovod", "torch"):
        if name in machine:
            software.append(f"{name} {machine[name]}")
    return f"{hardware}; {', '.join([*software, 'Python ' + machine['python']])}"


def placement(machine: Mapping[str, Any]) -> str:
    """Return the hosts of the ranks, and whether each rank had its own cores."""
    hosts = machine["hosts"]
    where = f"{len(hosts)} host{'s' * (len(hosts) > 1)} ({', '.join(hosts[:8])})"
    if machine["pinned"]:
        return f"{where}, each rank bound to a core of its own"
    return f"{where}; NOT pinned: there are fewer cores than ranks, so ranks disturb one another"


def _mpi() -> str:
    launcher = mpirun.find()
    if launcher is None:
        return "no MPI launcher"
    environ = {**os.environ, **launcher.settings(os.environ)}
    return mpi_name(run_captured([launcher.program, "--version"], environ, 60).stdout)


def _version(packages: tuple[str, ...]) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None
