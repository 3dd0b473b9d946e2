"""hvdtrain's own engines: an array that lies in NumPy, or a tensor inside a `tf.function`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from hvdtrain.bench.work.sums import Way, measure
from hvdtrain.collectives.engine import Call, Engine, Op


def prepare(settings: Mapping[str, Any]) -> Callable[[dict], dict]:
    """Starts the engine that HVDTRAIN_ENGINE names; with `graph`, sums go the way of a gradient."""
    graph = settings.get("graph", False)
    if graph:
        import tensorflow  # noqa: F401  # before MPI, as in a training script
    from hvdtrain import runtime

    engine = runtime.init()
    way = Way(engine.barrier, partial(_in_graph if graph else _in_numpy, engine))
    return lambda request: measure(way, request, engine.rank, engine.size)


def _in_numpy(engine: Engine, array: np.ndarray) -> Callable[[], np.ndarray]:
    out = np.empty_like(array)
    return lambda: engine.allreduce(array, Op.SUM, out=out)


def _in_graph(engine: Engine, array: np.ndarray) -> Callable[[], Any]:
    import tensorflow as tf

    from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
    from hvdtrain.gradients.exchange import Exchange

    exchange = Exchange(engine, Op.SUM, Call("hvdtrain.bench", (f"{array.dtype}[{array.size}]",)))

    @tf.function
    def summed(tensor: Any) -> Any:
        return TensorFlowBridge().exchange(exchange, [tensor], []).dense[0]

    return partial(summed, tf.constant(array))
