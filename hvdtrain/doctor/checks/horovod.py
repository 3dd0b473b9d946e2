"""Horovod's native core: which TensorFlow and which MPI it was built for, whoever built it."""

import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.inquiry import Inquiry, NoAnswerError

# The version of a shared library's interface tells the family of an MPI, if not its version.
SONAMES = {b"libmpi.so.40": "Open MPI", b"libmpi.so.12": "MPICH"}
BUILD = "hvdtrain build-horovod"


@dataclass(frozen=True)
class Horovod:
    """What an installed Horovod was built for; empty where that is not known.

    Args:
        tensorflow: The TensorFlow it was compiled against; empty when without TensorFlow.
        python: Python's version as "3.11".
        mpi: The MPI, with its version where the build left a record.
        gpu: What sums on GPUs: "nccl", "none", or empty when not known.
        recorded: Whether `hvdtrain build-horovod` built it.
    """

    tensorflow: str
    python: str = ""
    mpi: str = ""
    gpu: str = ""
    recorded: bool = False


def installed() -> Horovod | None:
    """Reads what the Horovod of this environment was built for, without importing it."""
    spec = importlib.util.find_spec("horovod")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return read(Path(folders[0])) if folders else None


def read(package: Path) -> Horovod:
    """Reads the records in Horovod's package, and in their absence the library itself."""
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
    """Tells the family of the MPI that a shared library names; empty when it names none."""
    found = re.search(rb"libmpi\.so\.\d+", core.read_bytes())
    return SONAMES.get(found.group(), "") if found else ""


def horovod(inquiry: Inquiry, found: Horovod | None) -> Finding:
    """Checks that Horovod was built for the TensorFlow and Python that are here."""
    try:
        stack = inquiry.stack
    except NoAnswerError:
        stack = {}
    return judge_horovod(found, stack)


def judge_horovod(found: Horovod | None, stack: dict[str, Any]) -> Finding:
    """Judges a Horovod, or its absence, beside the TensorFlow that is here."""
    if found is None:
        return note("Horovod", "It is not installed; training goes over the mpi engine.", BUILD)
    if not found.tensorflow:
        return wrong("Horovod", "It was built without TensorFlow, as pip does in build isolation.", BUILD)
    here, running = stack.get("tensorflow"), f"{sys.version_info.major}.{sys.version_info.minor}"
    if here and here.partition("+")[0] != found.tensorflow.partition("+")[0]:
        said = f"It was built for TensorFlow {found.tensorflow}, but TensorFlow {here} is here."
        return wrong("Horovod", said, BUILD)
    if found.python and found.python != running:
        said = f"It was built for Python {found.python}, but this is Python {running}."
        return wrong("Horovod", said, BUILD)
    if found.recorded and stack.get("gpus") and found.gpu in ("", "none"):
        return note(
            "Horovod", f"{describe(found)}. Its sums leave the GPU for host memory.", f"{BUILD} --gpu nccl"
        )
    if not found.recorded:
        return ok("Horovod", f"{describe(found)}; hvdtrain did not build it")
    return ok("Horovod", describe(found))


def describe(found: Horovod) -> str:
    """Says in one line what a Horovod was built for."""
    gpu = f", GPU: {found.gpu}" if found.gpu else ""
    return f"Built for TensorFlow {found.tensorflow} and {found.mpi or 'an MPI it does not name'}{gpu}"


def _json(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # absent or damaged: what is not known is asked elsewhere
        return {}
