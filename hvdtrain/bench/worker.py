"""Run a contender's work on one rank: read requests from standard input, write answers to standard output.

    python -m hvdtrain.bench.worker hvdtrain.bench.allreduce_workers:mpi

The first line holds the settings. Everything that libraries print goes to standard error.
"""

import json
import math
import os
import pkgutil
import resource
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from hvdtrain import cores

if TYPE_CHECKING:
    import numpy as np


def main() -> None:
    """Prepare the work, report that it is ready, and answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answer = pkgutil.resolve_name(sys.argv[1])(json.loads(sys.stdin.readline()))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers)


@final
@dataclass
class StepWorker:
    """Times training steps of any framework, and at the end describes the state of the model."""

    run: Callable[[int, int], float]  # trains on batches of a size, `run(batch, steps)`, and returns the loss
    weights: "Callable[[], Sequence[np.ndarray]]"  # returns the trainable weights
    rank: int
    # Runs an epoch of `fit`, `epoch(batch, steps)`, and returns its seconds and the loss. None if the framework has
    # no `fit`: then an epoch is only its steps.
    epoch: Callable[[int, int], tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        self._finite = True

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `seconds` of a step, nothing on a rank that does not run, or the state of the model.

        Args:
            request: `batch` and the number of steps of a turn, `repeat`; with `first_only` only rank 0 runs; with
                `fit` the turn is an epoch. Or `end`, which asks for the state of the model.
        """
        if request.get("end"):
            return self._final_state()
        if request.get("first_only") and self.rank:
            return {}
        measure = self.epoch if request.get("fit") and self.epoch else self._time_steps
        seconds, loss = measure(request["batch"], request["repeat"])
        self._finite = self._finite and math.isfinite(loss)
        return {"seconds": seconds / request["repeat"]}

    def _time_steps(self, batch: int, steps: int) -> tuple[float, float]:
        # Other contenders ran before: one step without timing fills the caches and synchronizes the ranks.
        self.run(batch, 1)
        started = time.perf_counter()
        loss = self.run(batch, steps)
        return time.perf_counter() - started, loss

    def _final_state(self) -> dict[str, Any]:
        import numpy as np  # not before `main` has redirected what libraries print

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before the weights are copied
        weights = self.weights()
        checksum = 0
        for weight in weights:
            checksum = zlib.crc32(np.ascontiguousarray(weight).data, checksum)
        return {
            "checksum": checksum,
            "finite": self._finite and all(bool(np.isfinite(weight).all()) for weight in weights),
            "peak": peak,
            "gradients": sum(weight.nbytes for weight in weights),
        }


def threads(settings: Mapping[str, Any]) -> int:
    """Return the number of threads that `hvd.init()` would take, for workers that do not call it."""
    hosts = [address.rpartition(":")[0] for address in settings["addresses"]]
    mine, local_size = cores.allowed(), hosts.count(hosts[settings["rank"]])
    # Processes that are bound, each to its own part of the host, have no core in common.
    bound = len(mine) * local_size <= (os.cpu_count() or 1)
    others = [frozenset[int]() if bound else mine] * (local_size - 1)
    share = cores.share(mine, [mine, *others], cores.quota())
    return min(share, cores.granted() or share)


if __name__ == "__main__":
    main()
