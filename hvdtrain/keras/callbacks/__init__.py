"""Callbacks for `model.fit` on several ranks; one a file."""

from hvdtrain.keras.callbacks.best_model import BestModelCheckpoint
from hvdtrain.keras.callbacks.broadcast import BroadcastGlobalVariablesCallback
from hvdtrain.keras.callbacks.learning_rate import LearningRateScheduleCallback, LearningRateWarmupCallback
from hvdtrain.keras.callbacks.metric_average import MetricAverageCallback

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]
