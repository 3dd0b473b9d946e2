"""Find metric functions that return one number per batch, whose mean depends on the division of samples."""

from collections.abc import Iterable
from typing import Any

import keras

from hvdtrain.keras.metrics.states import leaves


def per_batch(metrics: Iterable[Any], batches: int, samples: float) -> list[str]:
    """List the metrics whose function has returned one number per batch, not one per sample.

    Args:
        metrics: Metrics at the end of a stage.
        batches: Number of batches in the stage.
        samples: Number of samples in the stage.
    """
    functions = [metric for metric in leaves(metrics) if isinstance(metric, keras.metrics.MeanMetricWrapper)]
    return [
        metric.name
        for metric in functions
        if not getattr(metric._fn, "__module__", "").startswith("keras.")
        and float(metric.count.numpy()) == batches < samples
    ]
