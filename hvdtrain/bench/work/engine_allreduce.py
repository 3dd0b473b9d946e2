"""Call `allreduce` of hvdtrain's engines, on a NumPy array or on a tensor inside a `tf.function`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from hvdtrain.bench.work.sums import Method, measure
from hvdtrain.collectives.engine import Call, Engine, Op


def prepare(settings: Mapping[str, Any]) -> Callable[[dict], dict]:
    """Start the engine that HVDTRAIN_ENGINE names.

    Args:
        settings: `graph`: whether to reduce tensors through the same code as gradients.

    Returns:
        A function that answers requests.
    """
    graph = settings.get("graph", False)
    if graph:
        import tensorflow  # noqa: F401  # before MPI, as in a training script
    from hvdtrain import runtime

    engine = runtime.init()
    method = Method(engine.barrier, partial(_bind_graph if graph else _bind_numpy, engine))
    return lambda request: measure(method, request, engine.rank, engine.size)


def _bind_numpy(engine: Engine, array: np.ndarray) -> Callable[[], np.ndarray]:
    out = np.empty_like(array)
    return lambda: engine.allreduce(array, Op.SUM, out=out)


def _bind_graph(engine: Engine, array: np.ndarray) -> Callable[[], Any]:
    import tensorflow as tf

    from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
    from hvdtrain.gradients.exchange import Exchange

    exchange = Exchange(engine, Op.SUM, Call("hvdtrain.bench", (f"{array.dtype}[{array.size}]",)))

    @tf.function
    def reduced(tensor: Any) -> Any:
        return TensorFlowBridge().exchange(exchange, [tensor], []).dense[0]

    return partial(reduced, tf.constant(array))
