"""Which machine a measurement was made on, so that numbers are not compared that cannot be."""

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from hvdtrain import cores
from hvdtrain.bench.scheduler import Field
from hvdtrain.collectives.mpi.library import mpi_name
from hvdtrain.launch.launchers import binding, mpirun
from hvdtrain.launch.run_program import ask

_PACKAGES = {
    "tensorflow": ("tensorflow", "tensorflow-cpu", "intel-tensorflow"),
    "keras": ("keras",),
    "tf_keras": ("tf_keras",),
    "horovod": ("horovod",),
    "torch": ("torch",),
    "mpi4py": ("mpi4py",),
    "numpy": ("numpy",),
}


def describe(field: Field) -> dict[str, Any]:
    """Describes the host that measures, the software, and how the ranks were placed.

    Args:
        field: Whose ranks they are.
    """
    return {
        "host": platform.node(),
        "cpu": cores.model(),
        "cores": len(binding.cores()),
        "quota": cores.quota(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "mpi": _mpi(),
        **{name: version for name, packages in _PACKAGES.items() if (version := _version(packages))},
        "hosts": field.hosts,
        "pinned": field.pinned,
    }


def summary(machine: Mapping[str, Any]) -> str:
    """Writes the description as one line."""
    place = f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']:g} GiB"
    names = ("mpi", "tensorflow", "keras", "horovod", "torch")
    software = [
        str(machine[name]) if name == "mpi" else f"{name} {machine[name]}"
        for name in names
        if name in machine
    ]
    return f"{place}; {', '.join([*software, 'Python ' + machine['python']])}"


def placement(machine: Mapping[str, Any]) -> str:
    """Says on which hosts the ranks were, and whether each had cores of its own."""
    hosts = machine["hosts"]
    where = f"{len(hosts)} host{'s' * (len(hosts) > 1)} ({', '.join(hosts[:8])})"
    if machine["pinned"]:
        return f"{where}, each rank bound to a core of its own"
    return f"{where}; NOT pinned: there are fewer cores than ranks, so ranks disturb one another"


def _mpi() -> str:
    launcher = mpirun.find()
    if launcher is None:
        return "no MPI launcher"
    return mpi_name(
        ask([launcher.program, "--version"], {**os.environ, **launcher.settings(os.environ)}, 60).stdout
    )


def _version(packages: tuple[str, ...]) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None
