"""Check that Horovod's native core was built for the TensorFlow, Python and MPI of this environment."""

import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.probe_runner import ProbeError, ProbeRunner

# The ABI version in the name of MPI's shared library identifies the MPI family, but not the MPI version.
SONAMES = {b"libmpi.so.40": "Open MPI", b"libmpi.so.12": "MPICH"}
BUILD = "hvdtrain build-horovod"


@dataclass(frozen=True)
class Horovod:
    """The versions for which an installed Horovod was built; empty if not known.

    Args:
        tensorflow: The version of TensorFlow; empty if it was built without TensorFlow.
        python: Python's version as "3.11".
        mpi: The MPI, with its version if the build left a record.
        gpu: The library for allreduces on GPUs: "nccl", "none", or empty if not known.
        recorded: Whether `hvdtrain build-horovod` built it.
    """

    tensorflow: str
    python: str = ""
    mpi: str = ""
    gpu: str = ""
    recorded: bool = False


def installed() -> Horovod | None:
    """Return what the Horovod of this environment was built for, without importing it; None if not installed."""
    spec = importlib.util.find_spec("horovod")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return read(Path(folders[0])) if folders else None


def read(package: Path) -> Horovod:
    """Read the build records in Horovod's package, or the shared library if there are none."""
    core = next(package.glob("tensorflow/mpi_lib*.so"), None)
    record = _json(package / "hvdtrain_build.json")
    if record:
        tensorflow = record.get("tensorflow", "") if core else ""
        return Horovod(
            tensorflow, record.get("python", ""), record.get("mpi", ""), record.get("gpu", ""), True
        )
    metadata = _json(package / "metadata.json")
    return Horovod(metadata.get("tensorflow", "") if core else "", mpi=linked_mpi(core) if core else "")


def linked_mpi(core: Path) -> str:
    """Return the family of the MPI to which a shared library is linked; empty if it is linked to none."""
    found = re.search(rb"libmpi\.so\.\d+", core.read_bytes())
    return SONAMES.get(found.group(), "") if found else ""


def horovod(probes: ProbeRunner, found: Horovod | None) -> Finding:
    """Check that Horovod was built for the TensorFlow and Python of this environment."""
    try:
        stack = probes.stack
    except ProbeError:
        stack = {}
    return judge_horovod(found, stack)


def judge_horovod(found: Horovod | None, stack: dict[str, Any]) -> Finding:
    """Judge the installed Horovod, None if there is none, for the TensorFlow that is here."""
    if found is None:
        return note("Horovod", "It is not installed; training uses the mpi engine.", BUILD)
    if not found.tensorflow:
        return wrong("Horovod", "It was built without TensorFlow, as pip does in build isolation.", BUILD)
    here, running = stack.get("tensorflow"), f"{sys.version_info.major}.{sys.version_info.minor}"
    if here and here.partition("+")[0] != found.tensorflow.partition("+")[0]:
        problem = f"It was built for TensorFlow {found.tensorflow}, but TensorFlow {here} is here."
        return wrong("Horovod", problem, BUILD)
    if found.python and found.python != running:
        problem = f"It was built for Python {found.python}, but this is Python {running}."
        return wrong("Horovod", problem, BUILD)
    if found.recorded and stack.get("gpus") and found.gpu in ("", "none"):
        return note(
            "Horovod",
            f"{describe(found)}. Its allreduces copy gradients from the GPU to host memory.",
            f"{BUILD} --gpu nccl",
        )
    if not found.recorded:
        return ok("Horovod", f"{describe(found)}; hvdtrain did not build it")
    return ok("Horovod", describe(found))


def describe(found: Horovod) -> str:
    """Return one line with the versions for which a Horovod was built."""
    gpu = f", GPU: {found.gpu}" if found.gpu else ""
    return f"Built for TensorFlow {found.tensorflow} and {found.mpi or 'an MPI it does not name'}{gpu}"


def _json(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # absent or damaged: the shared library is read instead
        return {}
