"""Train with tf_keras (Keras 2): in one process, with stock Horovod, or with MultiWorkerMirroredStrategy."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from hvdtrain.bench.models.keras_models import compiled

HOROVOD, STRATEGY = "horovod", "strategy"

# Between their turns all ranks are stopped for longer than the default limit of TensorFlow's heartbeat.
_HEARTBEAT_SECONDS = 3600


def prepare(settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict]:
    """Build the model, the same on all ranks.

    Args:
        settings: `model`, one of `WORKLOADS`; `mode`: "plain" for an independent process, "horovod" for stock
            Horovod's DistributedOptimizer, "strategy" for MultiWorkerMirroredStrategy.

    Returns:
        A function that answers requests.
    """
    import tf_keras

    from hvdtrain.bench.work.keras_steps import KerasSteps, take_threads

    take_threads(settings)
    tf_keras.utils.set_random_seed(0)
    model = settings["model"]
    if settings["mode"] == HOROVOD:
        return KerasSteps(tf_keras, compiled(tf_keras, model, _averaged), settings).worker()
    if settings["mode"] != STRATEGY:
        return KerasSteps(tf_keras, compiled(tf_keras, model), settings).worker()
    strategy = _strategy(settings)
    with strategy.scope():
        distributed_model = compiled(tf_keras, model)

    def iterate(data: Any) -> Any:
        return iter(_distribute(strategy, data))

    fit_arguments = functools.partial(_distributed_arrays, strategy, settings)
    return KerasSteps(tf_keras, distributed_model, settings, iterate, fit_arguments).worker()


def _averaged(optimizer: Any) -> Any:
    import horovod.tensorflow.keras as hvd

    hvd.init()
    return hvd.DistributedOptimizer(optimizer)


def _distribute(strategy: Any, data: Any) -> Any:
    """Return a distributed data set, of which each worker takes the batches that it has made itself."""
    return strategy.distribute_datasets_from_function(lambda _: data)


def _distributed_arrays(strategy: Any, settings: Mapping[str, Any], batch: int, steps: int) -> dict[str, Any]:
    import tensorflow as tf

    from hvdtrain.bench.work.keras_steps import samples

    arrays = samples(settings["model"], batch, steps, settings["rank"])
    data = tf.data.Dataset.from_tensor_slices(arrays).batch(batch).repeat()
    return {"x": _distribute(strategy, data), "steps_per_epoch": steps}


def _strategy(settings: Mapping[str, Any]) -> Any:
    import tensorflow as tf

    task = {"type": "worker", "index": settings["rank"]}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": settings["addresses"]}, "task": task})
    _lengthen_heartbeat(settings["size"])
    return tf.distribute.MultiWorkerMirroredStrategy()


def _lengthen_heartbeat(workers: int) -> None:
    """Configure the coordination service as the strategy would, but with a longer limit of its heartbeat."""
    from tensorflow.python.distribute.collective_all_reduce_strategy import coordination_config_pb2
    from tensorflow.python.eager import context

    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        heartbeat_timeout_in_ms=_HEARTBEAT_SECONDS * 1000,
        coordinated_jobs=[coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=workers)],
    )
