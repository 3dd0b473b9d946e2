"""What every worker of `bench step` does with a request, whatever its framework."""

import math
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from hvdtrain import cores


@final
class Stepping:
    """Answers requests: times a block of steps, or tells in the end what has become of the model.

    Args:
        run: Runs steps on batches of a size, `run(batch, steps)`, and returns the loss.
        weights: Returns the weights that are trained.
        rank: Which of the contender's processes this is.
        epoch: Runs an epoch of `fit`, `epoch(batch, steps)`, and returns its seconds and the loss. None where an
            epoch is no more than its steps.
    """

    def __init__(
        self,
        run: Callable[[int, int], float],
        weights: Callable[[], Sequence[np.ndarray]],
        rank: int,
        epoch: Callable[[int, int], tuple[float, float]] | None = None,
    ) -> None:
        self._run = run
        self._epoch = epoch
        self._weights = weights
        self._rank = rank
        self._finite = True

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answers one request.

        Args:
            request: `batch` and `steps` of a block, and with `first_only` all ranks but the first rest, with `fit`
                the block is an epoch; or `end`.
        """
        if request.get("end"):
            return self._end()
        if request.get("first_only") and self._rank:
            return {}
        measure = self._epoch if request.get("fit") and self._epoch else self._steps
        seconds, loss = measure(request["batch"], request["steps"])
        self._finite = self._finite and math.isfinite(loss)
        return {"seconds": seconds / request["steps"]}

    def _steps(self, batch: int, steps: int) -> tuple[float, float]:
        # The others were at work before: this step brings caches and ranks back, and is not timed.
        self._run(batch, 1)
        started = time.perf_counter()
        loss = self._run(batch, steps)
        return time.perf_counter() - started, loss

    def _end(self) -> dict[str, Any]:
        peak = peak_memory()  # before copies are made of the weights
        weights = self._weights()
        checksum = 0
        for each in weights:
            checksum = zlib.crc32(np.ascontiguousarray(each).data, checksum)
        return {
            "checksum": checksum,
            "finite": self._finite and all(bool(np.isfinite(each).all()) for each in weights),
            "peak": peak,
            "gradients": sum(each.nbytes for each in weights),
        }


def threads(settings: Mapping[str, Any]) -> int:
    """Returns with how many threads a process computes that shares its host with the others of its contender.

    It is what `hvd.init()` takes, for those that do not call it.

    Args:
        settings: What `prepare` is given.
    """
    hosts = [address.rpartition(":")[0] for address in settings["addresses"]]
    mine, here = cores.allowed(), hosts.count(hosts[settings["rank"]])
    # Processes that are bound each to its own part of the host have no core in common.
    bound = len(mine) * here <= (os.cpu_count() or 1)
    others = [frozenset[int]() if bound else mine] * (here - 1)
    fair = cores.share(mine, [mine, *others], cores.quota())
    return min(fair, cores.granted() or fair)


def peak_memory() -> int:
    """Returns the most memory, in bytes, that this process has had at one time."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
