"""Copy an array, or add two arrays, on one core, to measure the limits of the machine."""

from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np


def prepare(settings: Mapping[str, Any]) -> Callable[[dict], dict]:
    """Select the operation.

    Args:
        settings: `operation`: "copy" or "add".

    Returns:
        A function that answers requests.

    Raises:
        ValueError: For another operation.
    """
    operation = settings["operation"]
    if operation not in ("copy", "add"):
        raise ValueError(f"operation must be copy or add. Received: {operation!r}.")
    return partial(_measure, operation)


def _measure(operation: str, request: Mapping[str, Any]) -> dict[str, Any]:
    dtype = np.dtype(np.uint8 if operation == "copy" else request["dtype"])
    array = np.ones(request["bytes"] // dtype.itemsize, dtype)
    out = np.ones_like(array)
    copy, add = partial(np.copyto, out, array), partial(np.add, out, array, out=out)
    once: Callable[[], Any] = copy if operation == "copy" else add
    once()
    begun = perf_counter()
    for _ in range(request["repeat"]):
        once()
    return {"seconds": (perf_counter() - begun) / request["repeat"], "right": True}
