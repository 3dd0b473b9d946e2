"""Stock Horovod: its own operation inside a `tf.function`, with its default settings."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.bench.work.sums import Way, measure
from hvdtrain.collectives.horovod.library import load_horovod


def prepare(settings: Mapping[str, Any]) -> Callable[[dict], dict]:
    """Starts Horovod."""
    horovod = load_horovod()
    horovod.init()
    nothing = tf.zeros(())
    way = Way(lambda: horovod.allreduce(nothing, name="bench.barrier"), partial(_bound, horovod))
    return lambda request: measure(way, request, horovod.rank(), horovod.size())


def _bound(horovod: Any, array: np.ndarray) -> Callable[[], Any]:
    @tf.function
    def summed(tensor: Any) -> Any:
        return horovod.allreduce(tensor, op=horovod.Sum, name=f"bench.{array.dtype}.{array.size}")

    return partial(summed, tf.constant(array))
