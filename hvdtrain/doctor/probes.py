"""Examine TensorFlow, MPI or an allreduce in a separate process, and print one line of JSON.

Doctor itself loads neither TensorFlow, which is slow and prints much, nor MPI, which may abort the process.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from hvdtrain import settings

ELEMENTS = 1 << 20  # 4 MiB: beyond every eager limit, so the transport that training will use is used


def main() -> None:
    """Run the probe that is named on the command line, with the arguments after its name."""
    probe, *arguments = sys.argv[1:]
    probes: dict[str, Callable[..., None]] = {
        "allreduce": _allreduce,
        "mpi": _mpi,
        "patches": _patches,
        "stack": _stack,
    }
    probes[probe](*arguments)


def _print(facts: Any) -> None:
    # Earlier output of a library may have ended without a newline.
    print("\n" + json.dumps(facts), flush=True)


def _allreduce(seconds: str) -> None:
    """Sum rank + 1 over all ranks, over the engine that training would use."""
    signal.alarm(int(seconds))  # ends a rank that hangs inside MPI, also if its launcher does not end it
    if settings.get("HVDTRAIN_ENGINE") == "horovod":
        import tensorflow  # noqa: F401  # before MPI, as in a training script
    import numpy as np

    from hvdtrain import runtime

    engine = runtime.init()
    summed = engine.allreduce(np.full(ELEMENTS, engine.rank + 1, np.float32), op="sum")
    if engine.rank == 0:
        _print({"size": engine.size, "lowest": float(np.min(summed)), "highest": float(np.max(summed))})
    runtime.shutdown()


def _mpi() -> None:
    """Load the MPI library that mpi4py finds, and print its name and version.

    Without MPI_Init this is safe under the launcher of another MPI and without a launcher.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    _print({"mpi4py": mpi4py.__version__, "library": MPI.Get_library_version()})


def _patches() -> None:
    """Start hvdtrain in one process, and print each replaced function, the module that did it, and its purpose."""
    import hvdtrain.keras as hvd
    from hvdtrain import patching

    hvd.init()
    rows = []
    for entry in patching.replaced:
        purpose = (sys.modules[entry.by].__doc__ or "").splitlines()[0]
        rows.append({"replaced": entry.name, "by": entry.by, "purpose": purpose})
    _print(rows)


def _stack() -> None:
    """Import TensorFlow and Keras as a training script would, and print their versions, backend, GPUs or errors."""
    facts: dict[str, object] = {}
    for name, examine in {"tensorflow": _tensorflow, "keras": _keras}.items():
        try:
            facts |= examine()
        except BaseException as error:  # a broken wheel may raise anything, SystemExit too
            facts[f"{name}_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    _print(facts)
    os._exit(0)  # skips TensorFlow's shutdown, which is slow and may print messages


def _tensorflow() -> dict[str, object]:
    import tensorflow

    gpus = [gpu.name for gpu in tensorflow.config.list_physical_devices("GPU")]
    cuda = bool(tensorflow.test.is_built_with_cuda())
    return {"tensorflow": tensorflow.__version__, "gpus": gpus, "cuda": cuda}


def _keras() -> dict[str, object]:
    import keras

    return {"keras": keras.__version__, "backend": keras.backend.backend()}
