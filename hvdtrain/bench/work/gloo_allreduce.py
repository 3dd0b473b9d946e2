"""Call `torch.distributed.all_reduce` over Gloo, in place, as DistributedDataParallel does."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hvdtrain.bench.work.sums import Method, measure


def prepare(settings: Mapping[str, Any]) -> Callable[[dict], dict]:
    """Join the process group that MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE describe.

    Returns:
        A function that answers requests.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    method = Method(dist.barrier, _bind, _fetch)
    return lambda request: measure(method, request, dist.get_rank(), dist.get_world_size())


def _bind(array: np.ndarray) -> Callable[[], tuple]:
    source = torch.from_numpy(array)
    buffer = source.clone()

    def once() -> tuple:
        dist.all_reduce(buffer)
        return source, buffer

    return once


def _fetch(result: tuple) -> np.ndarray:
    """Sum once more from the original array: in place, each repetition has summed the result of the one before."""
    source, buffer = result
    buffer.copy_(source)
    dist.all_reduce(buffer)
    return buffer.numpy()
