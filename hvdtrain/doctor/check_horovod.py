"""Check which engine a training uses, and that Horovod's core was built for this TensorFlow, Python and MPI."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain import settings
from hvdtrain.collectives.horovod.engine import reason_not_to_use
from hvdtrain.collectives.horovod.library import find_horovod
from hvdtrain.collectives.mpi.library import mpi_name
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.probe_runner import ProbeError, ProbeRunner
from hvdtrain.runtime import CHOICES

# The ABI version in the name of MPI's shared library identifies the MPI family, but not the MPI version.
SONAMES = {b"libmpi.so.40": "Open MPI", b"libmpi.so.12": "MPICH"}
BUILD = "hvdtrain build-horovod"


@dataclass(frozen=True)
class Horovod:
    """The versions for which an installed Horovod was built; empty if not known."""

    tensorflow: str  # empty if it was built without TensorFlow
    python: str = ""  # as "3.11"
    mpi: str = ""  # with its version if the build left a record
    gpu: str = ""  # the library for allreduces on GPUs: "nccl" or "none"
    recorded: bool = False  # whether `hvdtrain build-horovod` built it


def installed() -> Horovod | None:
    """Return what the Horovod of this environment was built for, without importing it; None if not installed."""
    spec = find_horovod()
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return read(Path(folders[0])) if folders else None


def read(package: Path) -> Horovod:
    """Read the build records in Horovod's package, or the shared library if there are none."""
    core = next(package.glob("tensorflow/mpi_lib*.so"), None)
    record = _read_json(package / "hvdtrain_build.json")
    if record:
        tensorflow = record.get("tensorflow", "") if core else ""
        python, mpi, gpu = (record.get(name, "") for name in ("python", "mpi", "gpu"))
        return Horovod(tensorflow, python, mpi, gpu, recorded=True)
    if core is None:
        return Horovod("")
    soname = re.search(rb"libmpi\.so\.\d+", core.read_bytes())
    mpi = SONAMES.get(soname.group(), "") if soname else ""
    return Horovod(_read_json(package / "metadata.json").get("tensorflow", ""), mpi=mpi)


def _read_json(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # absent or damaged: the shared library is read instead
        return {}


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
    gpu = f", GPU: {found.gpu}" if found.gpu else ""
    built = f"Built for TensorFlow {found.tensorflow} and {found.mpi or 'an MPI it does not name'}{gpu}"
    if not found.recorded:
        return ok("Horovod", f"{built}; hvdtrain did not build it")
    if stack.get("gpus") and found.gpu in ("", "none"):
        problem = f"{built}. Its allreduces copy gradients from the GPU to host memory."
        return note("Horovod", problem, f"{BUILD} --gpu nccl")
    return ok("Horovod", built)


def engine(probes: ProbeRunner) -> Finding:
    """Return the engine that `HVDTRAIN_ENGINE` selects, or the one used if it is not set."""
    chosen = settings.get("HVDTRAIN_ENGINE", probes.environ).lower()
    try:
        reason = reason_not_to_use(probes.stack["tensorflow"], mpi_name(probes.mpi["library"]))
    except (ProbeError, KeyError):
        reason = "TensorFlow or MPI is missing"
    return judge_engine(chosen, reason)


def judge_engine(chosen: str, reason: str | None) -> Finding:
    """Judge the selected engine; `reason` says why Horovod cannot be used here."""
    if chosen not in CHOICES:
        found = f"HVDTRAIN_ENGINE={chosen!r} is none of {', '.join(CHOICES)}."
        return wrong("Engine", found, "unset HVDTRAIN_ENGINE")
    if chosen == "single":
        found = "HVDTRAIN_ENGINE=single: no ranks, one process only."
        return note("Engine", found, "unset HVDTRAIN_ENGINE")
    if chosen == "horovod" and reason:
        found = f"HVDTRAIN_ENGINE=horovod, but {reason}."
        return wrong("Engine", found, f"{BUILD}   # or: unset HVDTRAIN_ENGINE")
    if chosen != "auto":
        return ok("Engine", f"{chosen}, as you chose")
    return ok("Engine", f"mpi, because {reason}" if reason else "horovod, built for this TensorFlow and MPI")
