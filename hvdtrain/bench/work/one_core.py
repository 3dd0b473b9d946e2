"""What one core can do with an array: copy it, or add it to another."""

from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np


def prepare(settings: Mapping[str, Any]) -> Callable[[dict], dict]:
    """Takes `what`: "copy" or "add"."""
    return partial(_measure, settings["what"])


def _measure(what: str, request: Mapping[str, Any]) -> dict[str, Any]:
    dtype = np.dtype(np.uint8 if what == "copy" else request["dtype"])
    array = np.ones(request["bytes"] // dtype.itemsize, dtype)
    out = np.ones_like(array)
    once = partial(np.copyto, out, array) if what == "copy" else partial(np.add, out, array, out=out)
    once()
    begun = perf_counter()
    for _ in range(request["repeat"]):
        once()
    return {"seconds": (perf_counter() - begun) / request["repeat"], "right": True}
