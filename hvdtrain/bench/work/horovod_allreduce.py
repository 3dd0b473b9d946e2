"""Call `allreduce` of stock Horovod inside a `tf.function`, with default settings."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.bench.work.sums import Method, measure
from hvdtrain.collectives.horovod.library import load_horovod


def prepare(settings: Mapping[str, Any]) -> Callable[[dict], dict]:
    """Start Horovod.

    Returns:
        A function that answers requests.
    """
    horovod = load_horovod()
    horovod.init()
    zero = tf.zeros(())
    method = Method(lambda: horovod.allreduce(zero, name="bench.barrier"), partial(_bind, horovod))
    return lambda request: measure(method, request, horovod.rank(), horovod.size())


def _bind(horovod: Any, array: np.ndarray) -> Callable[[], Any]:
    @tf.function
    def reduced(tensor: Any) -> Any:
        return horovod.allreduce(tensor, op=horovod.Sum, name=f"bench.{array.dtype}.{array.size}")

    return partial(reduced, tf.constant(array))
