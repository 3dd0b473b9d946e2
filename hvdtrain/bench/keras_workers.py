"""Train with Keras 3 or tf_keras (Keras 2), as each contender of `hvdtrain bench step` does.

`keras_step` and `tf_keras_step` are the work of contenders: they build the model, the same on all ranks.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import numpy as np
import tensorflow as tf

from hvdtrain.bench.models import WORKLOADS, compiled
from hvdtrain.bench.worker import StepWorker, threads

Settings = Mapping[str, Any]
FitArguments = Callable[[int, int], dict[str, Any]]  # of a batch and a number of steps, for an epoch

# Between their turns all ranks are stopped for longer than the default limit of TensorFlow's heartbeat.
_HEARTBEAT_SECONDS = 3600


def keras_step(settings: Settings) -> StepWorker:
    """Train with Keras 3.

    Args:
        settings: `model`, one of `WORKLOADS`; `mode`: "plain" for Keras alone, "wrapped" for hvdtrain in one
            process, "averaged" for hvdtrain, "compute_only" for hvdtrain without exchange between ranks; `xla`:
            whether XLA compiles the step; `compression`, as in `step_contenders.Options`; `kind`, "LocalSGD" or
            "DiLoCo", and `every`, for averages of weights.
    """
    import keras

    name, mode = settings["model"], settings["mode"]
    wrap: Callable[[Any], Any] | None = None
    fit_arguments: FitArguments | None = None
    if mode in ("plain", "wrapped"):
        _limit_threads(settings)
    if mode != "plain":
        import hvdtrain.keras as hvd

        hvd.init()
        if "every" in settings:
            averaged = partial(getattr(hvd, settings["kind"]), every=settings["every"])
        else:
            compression = _compression(hvd, settings.get("compression", ""))
            averaged = partial(hvd.DistributedOptimizer, compression=compression)
        wrap = _without_exchange if mode == "compute_only" else averaged
        fit_arguments = partial(_sharded, name)
    keras.utils.set_random_seed(0)
    model = compiled(keras, name, wrap, settings.get("xla", False))
    return KerasSteps(keras, model, settings, fit_arguments=fit_arguments).worker()


def _compression(hvd: Any, text: str) -> Any:
    """Return what a text such as "fp16" or "topk:0.01" stands for."""
    name, _, argument = text.partition(":")
    found = getattr(hvd.Compression, name or "none")
    if name in ("", "fp16", "bf16"):
        return found
    return found(*([json.loads(argument)] if argument else []))


def tf_keras_step(settings: Settings) -> StepWorker:
    """Train with tf_keras.

    Args:
        settings: `model`, one of `WORKLOADS`; `mode`: "plain" for an independent process, "horovod" for stock
            Horovod's DistributedOptimizer, "strategy" for MultiWorkerMirroredStrategy.
    """
    import tf_keras

    name, mode = settings["model"], settings["mode"]
    _limit_threads(settings)
    tf_keras.utils.set_random_seed(0)
    if mode == "strategy":
        return _with_strategy(tf_keras, settings).worker()
    wrap = None
    if mode == "horovod":
        import horovod.tensorflow.keras as hvd

        hvd.init()
        wrap = hvd.DistributedOptimizer
    return KerasSteps(tf_keras, compiled(tf_keras, name, wrap), settings).worker()


@final
@dataclass
class KerasSteps:
    """Runs the steps of a compiled model, through its train function or through `fit`."""

    keras: Any  # the module `keras` or `tf_keras`
    model: Any
    settings: Settings
    iterate: Callable[[Any], Iterator] = iter  # converts a data set to an iterator for the train function
    fit_arguments: FitArguments | None = None  # returns the data arguments of `fit`; arrays by default
    _prepared: dict[int, tuple[Callable[[Iterator], dict], Iterator]] = field(default_factory=dict)

    def worker(self) -> StepWorker:
        """Return the worker that answers the requests of `bench step`."""
        return StepWorker(self.run, self.weights, self.settings["rank"], self.epoch)

    def run(self, batch: int, steps: int) -> float:
        """Run steps on batches of a size and return the loss."""
        if batch not in self._prepared:
            self._prepared[batch] = self._prepare(batch)
        train, batches = self._prepared[batch]
        for _ in range(steps):
            logs = train(batches)
        return float(logs["loss"])

    def epoch(self, batch: int, steps: int) -> tuple[float, float]:
        """Return the seconds from the end of an epoch's first step to that of the next epoch, and the loss."""
        ends = list[float]()

        def record_end(step: int, logs: Any = None) -> None:
            if step == 0:
                ends.append(time.perf_counter())
                self.model.stop_training = len(ends) == 2

        timer = self.keras.callbacks.LambdaCallback(on_train_batch_end=record_end)
        data = (self.fit_arguments or self._arrays)(batch, steps)
        history = self.model.fit(**data, epochs=2, verbose=0, callbacks=[timer])
        return ends[1] - ends[0], history.history["loss"][-1]

    def weights(self) -> list[np.ndarray]:
        """Return the trainable weights; all ranks call this, as they may have to be averaged first."""
        getattr(self.model.optimizer, "average_weights", lambda: None)()
        return [var.numpy() for var in self.model.trainable_variables]

    def _arrays(self, batch: int, steps: int) -> dict[str, Any]:
        x, y = _samples(self.settings["model"], batch, steps, self.settings["rank"])
        return {"x": x, "y": y, "batch_size": batch}

    def _prepare(self, batch: int) -> tuple[Callable[[Iterator], dict], Iterator]:
        """Build a train function for one batch size; a shared one would be traced for a batch of unknown size."""
        self.model.make_train_function(force=True)
        workload = WORKLOADS[self.settings["model"]]
        inputs, labels = zip(*workload.batches(batch, self.settings["rank"]), strict=True)
        data = tf.data.Dataset.from_tensor_slices((np.stack(inputs), np.stack(labels))).repeat()
        return self.model.train_function, self.iterate(data)


class _LocalReducer:
    """A reducer that returns the rank's own gradients; all other attributes are those of the given reducer."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any], state: Sequence[Any]) -> list[Any]:
        return list(gradients)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)


def _without_exchange(optimizer: Any) -> Any:
    """Return the distributed optimizer with everything but the exchange of gradients."""
    import hvdtrain.keras as hvd

    distributed = hvd.DistributedOptimizer(optimizer)
    object.__setattr__(distributed, "_hvdtrain_reducer", _LocalReducer(distributed._hvdtrain_reducer))
    return distributed


def _sharded(model: str, batch: int, steps: int) -> dict[str, Any]:
    import hvdtrain.keras as hvd

    global_batch = batch * hvd.size()
    return {"x": hvd.shard(_samples(model, global_batch, steps, 0), batch_size=global_batch)}


def _samples(model: str, batch: int, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs and labels of an epoch, in which the few batches of the workload are repeated."""
    inputs, labels = map(np.concatenate, zip(*WORKLOADS[model].batches(batch, seed), strict=True))
    rows = np.arange(batch * steps) % len(inputs)
    return inputs[rows], labels[rows]


def _limit_threads(settings: Settings) -> None:
    """Limit TensorFlow to the number of threads that `hvd.init()` would take, unless the user has set it."""
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        tf.config.threading.set_intra_op_parallelism_threads(threads(settings))
        tf.config.threading.set_inter_op_parallelism_threads(max(2, threads(settings)))


def _with_strategy(keras: Any, settings: Settings) -> KerasSteps:
    strategy = _strategy(settings)
    with strategy.scope():
        model = compiled(keras, settings["model"])

    def distribute(data: Any) -> Any:
        # Of this data set each worker takes the batches that it has made itself.
        return strategy.distribute_datasets_from_function(lambda _: data)

    def fit_arguments(batch: int, steps: int) -> dict[str, Any]:
        arrays = _samples(settings["model"], batch, steps, settings["rank"])
        data = tf.data.Dataset.from_tensor_slices(arrays).batch(batch).repeat()
        return {"x": distribute(data), "steps_per_epoch": steps}

    return KerasSteps(keras, model, settings, lambda data: iter(distribute(data)), fit_arguments)


def _strategy(settings: Settings) -> Any:
    """Return the strategy; configure the coordination service as it would, but with a longer heartbeat limit."""
    from tensorflow.python.distribute.collective_all_reduce_strategy import coordination_config_pb2
    from tensorflow.python.eager import context

    task = {"type": "worker", "index": settings["rank"]}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": settings["addresses"]}, "task": task})
    workers = coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=settings["size"])
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        heartbeat_timeout_in_ms=_HEARTBEAT_SECONDS * 1000,
        coordinated_jobs=[workers],
    )
    return tf.distribute.MultiWorkerMirroredStrategy()
