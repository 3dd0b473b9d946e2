"""Metric functions that return one number for a batch: their mean depends on how samples are divided."""

from collections.abc import Iterable
from typing import Any

import keras

from hvdtrain.keras.metrics.states import leaves


def per_batch(metrics: Iterable[Any], batches: int, samples: float) -> list[str]:
    """Lists the metrics whose function has returned one number for each batch, not one for each sample.

    Args:
        metrics: Metrics that have seen a stage.
        batches: How many batches there were.
        samples: How many samples.
    """
    functions = [each for each in leaves(metrics) if isinstance(each, keras.metrics.MeanMetricWrapper)]
    return [
        each.name
        for each in functions
        if not getattr(each._fn, "__module__", "").startswith("keras.")
        and float(each.count.numpy()) == batches < samples
    ]
