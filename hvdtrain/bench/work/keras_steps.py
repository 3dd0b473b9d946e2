"""Run the steps of a Keras model, through its train function or through `fit`."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import numpy as np
import tensorflow as tf

from hvdtrain.bench.models.workloads import WORKLOADS
from hvdtrain.bench.work.step_worker import StepWorker, threads

FitArguments = Callable[[int, int], dict[str, Any]]


@final
class KerasSteps:
    """Runs steps of a compiled model of Keras 3 or tf_keras.

    Args:
        keras: The module `keras` or `tf_keras`.
        model: The model.
        settings: The argument of `prepare`.
        iterate: Converts a data set to an iterator that the model's train function accepts.
        fit_arguments: Returns the data arguments of `fit` for an epoch, `fit_arguments(batch, steps)`; by default
            arrays.
    """

    def __init__(
        self,
        keras: Any,
        model: Any,
        settings: Mapping[str, Any],
        iterate: Callable[[Any], Iterator] = iter,
        fit_arguments: FitArguments | None = None,
    ) -> None:
        self._keras = keras
        self._model = model
        self._settings = settings
        self._iterate = iterate
        self._fit_arguments = fit_arguments or self._arrays
        self._prepared: dict[int, tuple[Callable[[Iterator], dict], Iterator]] = {}

    def worker(self) -> StepWorker:
        """Return the worker that answers the requests of `bench step`."""
        return StepWorker(self.run, self.weights, self._settings["rank"], self.epoch)

    def run(self, batch: int, steps: int) -> float:
        """Run some steps and return the loss.

        Args:
            batch: Samples for each step on this rank.
            steps: Number of steps.
        """
        if batch not in self._prepared:
            self._prepared[batch] = self._prepare(batch)
        train, batches = self._prepared[batch]
        for _ in range(steps):
            logs = train(batches)
        return float(logs["loss"])

    def epoch(self, batch: int, steps: int) -> tuple[float, float]:
        """Run an epoch of `fit` and the first step of the next epoch.

        Args:
            batch: Samples for each step on this rank.
            steps: Steps of the epoch.

        Returns:
            The seconds from the end of the first step to the end of the next epoch's first step, and the loss.
        """
        ends = list[float]()

        def record_end(step: int, logs: Any = None) -> None:
            if step == 0:
                ends.append(time.perf_counter())
                self._model.stop_training = len(ends) == 2

        timer = self._keras.callbacks.LambdaCallback(on_train_batch_end=record_end)
        data = self._fit_arguments(batch, steps)
        history = self._model.fit(**data, epochs=2, verbose=0, callbacks=[timer])
        return ends[1] - ends[0], history.history["loss"][-1]

    def weights(self) -> list[np.ndarray]:
        """Return the trainable weights."""
        return [var.numpy() for var in self._model.trainable_variables]

    def _arrays(self, batch: int, steps: int) -> dict[str, Any]:
        x, y = samples(self._settings["model"], batch, steps, self._settings["rank"])
        return {"x": x, "y": y, "batch_size": batch}

    def _prepare(self, batch: int) -> tuple[Callable[[Iterator], dict], Iterator]:
        """Build a train function for one batch size; a shared one would be traced for a batch of unknown size."""
        self._model.make_train_function(force=True)
        workload = WORKLOADS[self._settings["model"]]
        inputs, labels = zip(*workload.batches(batch, self._settings["rank"]), strict=True)
        data = tf.data.Dataset.from_tensor_slices((np.stack(inputs), np.stack(labels))).repeat()
        return self._model.train_function, self._iterate(data)


def samples(model: str, batch: int, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs and labels of an epoch, in which the few batches of the workload are repeated.

    Args:
        model: One of `WORKLOADS`.
        batch: Samples for each step.
        steps: Steps of the epoch.
        seed: Seed of the random numbers.
    """
    batches = list(WORKLOADS[model].batches(batch, seed))
    inputs = np.concatenate([x for x, _ in batches])
    labels = np.concatenate([y for _, y in batches])
    rows = np.arange(batch * steps) % len(inputs)
    return inputs[rows], labels[rows]


def take_threads(settings: Mapping[str, Any]) -> None:
    """Limit TensorFlow to the number of threads that `hvd.init()` would take, unless the user has set it.

    Args:
        settings: The argument of `prepare`.
    """
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        tf.config.threading.set_intra_op_parallelism_threads(threads(settings))
        tf.config.threading.set_inter_op_parallelism_threads(max(2, threads(settings)))
