"""Answer the requests of `hvdtrain bench step` in a worker of any framework."""

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
class StepWorker:
    """Times training steps, and at the end describes the state of the model.

    Args:
        run: Runs steps on batches of a size, `run(batch, steps)`, and returns the loss.
        weights: Returns the trainable weights.
        rank: Rank of this process within its contender.
        epoch: Runs an epoch of `fit`, `epoch(batch, steps)`, and returns its seconds and the loss. None if the
            framework has no `fit`, so that an epoch is only its steps.
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
        """Answer one request.

        Args:
            request: `batch` and `steps` of a turn; with `first_only` only rank 0 runs; with `fit` the turn is an
                epoch. Or `end`, which asks for the state of the model.

        Returns:
            The `seconds` of a step, nothing on a rank that does not run, or the state of the model.
        """
        if request.get("end"):
            return self._final_state()
        if request.get("first_only") and self._rank:
            return {}
        measure = self._epoch if request.get("fit") and self._epoch else self._time_steps
        seconds, loss = measure(request["batch"], request["steps"])
        self._finite = self._finite and math.isfinite(loss)
        return {"seconds": seconds / request["steps"]}

    def _time_steps(self, batch: int, steps: int) -> tuple[float, float]:
        # Other contenders ran before: one step without timing fills the caches and synchronizes the ranks.
        self._run(batch, 1)
        started = time.perf_counter()
        loss = self._run(batch, steps)
        return time.perf_counter() - started, loss

    def _final_state(self) -> dict[str, Any]:
        peak = peak_memory()  # before the weights are copied
        weights = self._weights()
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
    """Return the number of threads of a process that shares its host with other processes of its contender.

    It is the number that `hvd.init()` takes, for workers that do not call it.

    Args:
        settings: The argument of `prepare`.
    """
    hosts = [address.rpartition(":")[0] for address in settings["addresses"]]
    mine, local_size = cores.allowed(), hosts.count(hosts[settings["rank"]])
    # Processes that are bound, each to its own part of the host, have no core in common.
    bound = len(mine) * local_size <= (os.cpu_count() or 1)
    others = [frozenset[int]() if bound else mine] * (local_size - 1)
    share = cores.share(mine, [mine, *others], cores.quota())
    return min(share, cores.granted() or share)


def peak_memory() -> int:
    """Return the maximum memory, in bytes, that this process has had at one time; 0 if it is unknown."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
