"""The steps of a Keras model, as `fit` runs them: through the model's own train function, on an iterator."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import numpy as np
import tensorflow as tf

from hvdtrain.bench.models.workloads import WORKLOADS
from hvdtrain.bench.work.stepping import Stepping, threads


@final
class KerasSteps:
    """Runs steps of a compiled model of Keras 3 or tf_keras.

    Args:
        model: The model.
        settings: What `prepare` was given.
        spread: Turns a data set into an iterator that the model's strategy takes.
    """

    def __init__(
        self, model: Any, settings: Mapping[str, Any], spread: Callable[[Any], Iterator] = iter
    ) -> None:
        self._model = model
        self._settings = settings
        self._spread = spread
        self._prepared: dict[int, tuple[Callable[[Iterator], dict], Iterator]] = {}

    def answering(self) -> Stepping:
        """Returns what answers the requests of `bench step`."""
        return Stepping(self.run, self.weights, self._settings["rank"])

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

    def weights(self) -> list[np.ndarray]:
        """Returns the weights that are trained."""
        return [each.numpy() for each in self._model.trainable_variables]

    def _prepare(self, batch: int) -> tuple[Callable[[Iterator], dict], Iterator]:
        """Makes a train function of its own for each size, so that none is traced for any size."""
        self._model.make_train_function(force=True)
        workload = WORKLOADS[self._settings["model"]]
        inputs, labels = zip(*workload.batches(batch, self._settings["rank"]), strict=True)
        data = tf.data.Dataset.from_tensor_slices((np.stack(inputs), np.stack(labels))).repeat()
        return self._model.train_function, self._spread(data)


def take_threads(settings: Mapping[str, Any]) -> None:
    """Limits TensorFlow to the threads that `hvd.init()` would take, unless the user has chosen.

    Args:
        settings: What `prepare` is given.
    """
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        tf.config.threading.set_intra_op_parallelism_threads(threads(settings))
        tf.config.threading.set_inter_op_parallelism_threads(max(2, threads(settings)))
