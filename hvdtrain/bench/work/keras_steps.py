"""The steps of a Keras model, as `fit` runs them: through the model's own train function, or by `fit` itself."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import numpy as np
import tensorflow as tf

from hvdtrain.bench.models.workloads import WORKLOADS
from hvdtrain.bench.work.step_worker import Stepping, threads

Feed = Callable[[int, int], dict[str, Any]]


@final
class KerasSteps:
    """Runs steps of a compiled model of Keras 3 or tf_keras.

    Args:
        keras: The module `keras` or `tf_keras`.
        model: The model.
        settings: What `prepare` was given.
        spread: Turns a data set into an iterator that the model's strategy takes.
        feed: Returns what a user gives to `fit` for an epoch, `feed(batch, steps)`; arrays if not given.
    """

    def __init__(
        self,
        keras: Any,
        model: Any,
        settings: Mapping[str, Any],
        spread: Callable[[Any], Iterator] = iter,
        feed: Feed | None = None,
    ) -> None:
        self._keras = keras
        self._model = model
        self._settings = settings
        self._spread = spread
        self._feed = feed or self._arrays
        self._prepared: dict[int, tuple[Callable[[Iterator], dict], Iterator]] = {}

    def answering(self) -> Stepping:
        """Returns what answers the requests of `bench step`."""
        return Stepping(self.run, self.weights, self._settings["rank"], self.epoch)

    def run(self, batch: int, steps: int) -> float:
        """Runs some steps and returns the loss.

        Args:
            batch: Samples a step on this rank.
            steps: How many.
        """
        if batch not in self._prepared:
            self._prepared[batch] = self._prepare(batch)
        train, batches = self._prepared[batch]
        for _ in range(steps):
            logs = train(batches)
        return float(logs["loss"])

    def epoch(self, batch: int, steps: int) -> tuple[float, float]:
        """Runs an epoch of `fit` and the first step of the next.

        Args:
            batch: Samples a step on this rank.
            steps: Steps of the epoch.

        Returns:
            The seconds from the end of the first step to the end of the next epoch's first step, and the loss.
        """
        ends = list[float]()

        def note(step: int, logs: Any = None) -> None:
            if step == 0:
                ends.append(time.perf_counter())
                self._model.stop_training = len(ends) == 2

        clock = self._keras.callbacks.LambdaCallback(on_train_batch_end=note)
        history = self._model.fit(**self._feed(batch, steps), epochs=2, verbose=0, callbacks=[clock])
        return ends[1] - ends[0], history.history["loss"][-1]

    def weights(self) -> list[np.ndarray]:
        """Returns the weights that are trained."""
        return [each.numpy() for each in self._model.trainable_variables]

    def _arrays(self, batch: int, steps: int) -> dict[str, Any]:
        x, y = samples(self._settings["model"], batch, steps, self._settings["rank"])
        return {"x": x, "y": y, "batch_size": batch}

    def _prepare(self, batch: int) -> tuple[Callable[[Iterator], dict], Iterator]:
        """Makes a train function of its own for each size, so that none is traced for any size."""
        self._model.make_train_function(force=True)
        workload = WORKLOADS[self._settings["model"]]
        inputs, labels = zip(*workload.batches(batch, self._settings["rank"]), strict=True)
        data = tf.data.Dataset.from_tensor_slices((np.stack(inputs), np.stack(labels))).repeat()
        return self._model.train_function, self._spread(data)


def samples(model: str, batch: int, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes the inputs and labels of an epoch, in which the workload's few batches come again and again.

    Args:
        model: One of `WORKLOADS`.
        batch: Samples a step.
        steps: Steps of the epoch.
        seed: Chooses the numbers.
    """
    inputs, labels = (
        np.concatenate(each) for each in zip(*WORKLOADS[model].batches(batch, seed), strict=True)
    )
    rows = np.arange(batch * steps) % len(inputs)
    return inputs[rows], labels[rows]


def take_threads(settings: Mapping[str, Any]) -> None:
    """Limits TensorFlow to the threads that `hvd.init()` would take, unless the user has chosen.

    Args:
        settings: What `prepare` is given.
    """
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        tf.config.threading.set_intra_op_parallelism_threads(threads(settings))
        tf.config.threading.set_inter_op_parallelism_threads(max(2, threads(settings)))
