"""One rank of a real allreduce: the way a gradient will go, with numbers whose sum is known."""

import json
import os
import signal
import sys

import numpy as np

ELEMENTS = 1 << 20  # 4 MiB: beyond every eager limit, so the transport that training will use is used


def main() -> None:
    """Sums rank + 1 over all ranks, within the seconds on the command line; rank 0 prints what it saw as JSON."""
    seconds = int(sys.argv[1])
    signal.alarm(seconds)  # a rank that hangs inside MPI dies by itself even where its launcher does not
    if os.environ["HVDTRAIN_ENGINE"] == "horovod":
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
