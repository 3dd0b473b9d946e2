"""Run one rank of an allreduce of numbers whose sum is known, over the engine that training would use."""

import json
import signal
import sys

import numpy as np

from hvdtrain import settings

ELEMENTS = 1 << 20  # 4 MiB: beyond every eager limit, so the transport that training will use is used


def main() -> None:
    """Sum rank + 1 over all ranks, within the seconds on the command line; rank 0 prints the result as JSON."""
    seconds = int(sys.argv[1])
    signal.alarm(seconds)  # ends a rank that hangs inside MPI, also if its launcher does not end it
    if settings.get("HVDTRAIN_ENGINE") == "horovod":
        import tensorflow  # noqa: F401  # before MPI, as in a training script

    from hvdtrain import runtime

    engine = runtime.init()
    summed = engine.allreduce(np.full(ELEMENTS, engine.rank + 1, np.float32), op="sum")
    seen = {"size": engine.size, "lowest": float(np.min(summed)), "highest": float(np.max(summed))}
    if engine.rank == 0:
        print("\n" + json.dumps(seen), flush=True)
    runtime.shutdown()


if __name__ == "__main__":
    main()
