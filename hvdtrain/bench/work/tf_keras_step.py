"""Steps of tf_keras, Keras 2 as it lives on: plain, with stock Horovod, or with TensorFlow's own strategy."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from hvdtrain.bench.models.keras_models import compiled

PLAIN, HOROVOD, STRATEGY = "plain", "horovod", "strategy"

# Between their turns all ranks stand still for longer than TensorFlow's workers would believe each other alive.
_PATIENCE = 3600  # seconds


def prepare(settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict]:
    """Builds the model, the same on all ranks.

    Args:
        settings: `model`, one of `WORKLOADS`; `way`: "plain" for one process by itself, "horovod" for stock
            Horovod's DistributedOptimizer, "strategy" for MultiWorkerMirroredStrategy.

    Returns:
        What answers requests.
    """
    import tf_keras

    from hvdtrain.bench.work.keras_steps import KerasSteps, take_threads

    take_threads(settings)
    tf_keras.utils.set_random_seed(0)
    if settings["way"] == STRATEGY:
        strategy = _strategy(settings)
        with strategy.scope():
            model = compiled(tf_keras, settings["model"])
        spread = functools.partial(_spread, strategy)
        feed = functools.partial(_spread_arrays, strategy, settings)
        return KerasSteps(tf_keras, model, settings, lambda data: iter(spread(data)), feed).answering()
    distribute = _averaged if settings["way"] == HOROVOD else _left
    return KerasSteps(tf_keras, compiled(tf_keras, settings["model"], distribute), settings).answering()


def _left(optimizer: Any) -> Any:
    return optimizer


def _averaged(optimizer: Any) -> Any:
    import horovod.tensorflow.keras as hvd

    hvd.init()
    return hvd.DistributedOptimizer(optimizer)


def _spread(strategy: Any, data: Any) -> Any:
    """Gives each worker the batches that it has made itself."""
    return strategy.distribute_datasets_from_function(lambda _: data)


def _spread_arrays(strategy: Any, settings: Mapping[str, Any], batch: int, steps: int) -> dict[str, Any]:
    import tensorflow as tf

    from hvdtrain.bench.work.keras_steps import samples

    arrays = samples(settings["model"], batch, steps, settings["rank"])
    data = tf.data.Dataset.from_tensor_slices(arrays).batch(batch).repeat()
    return {"x": _spread(strategy, data), "steps_per_epoch": steps}


def _strategy(settings: Mapping[str, Any]) -> Any:
    import tensorflow as tf

    task = {"type": "worker", "index": settings["rank"]}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": settings["addresses"]}, "task": task})
    _be_patient(settings["size"])
    return tf.distribute.MultiWorkerMirroredStrategy()


def _be_patient(workers: int) -> None:
    """Sets up the workers' coordination as the strategy would, but for the limit of its heartbeat."""
    from tensorflow.python.distribute.collective_all_reduce_strategy import coordination_config_pb2
    from tensorflow.python.eager import context

    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        heartbeat_timeout_in_ms=_PATIENCE * 1000,
        coordinated_jobs=[coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=workers)],
    )
