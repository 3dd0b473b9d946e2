"""Provide callbacks for `model.fit` on several ranks."""

from hvdtrain.keras.batch_normalization import AverageBatchNormStatistics
from hvdtrain.keras.callbacks.checkpoint import Checkpoint
from hvdtrain.keras.callbacks.distributed import distributed
from hvdtrain.keras.callbacks.initial_state import BroadcastGlobalVariablesCallback, RandomStatesCallback
from hvdtrain.keras.callbacks.learning_rate import LearningRateScheduleCallback, LearningRateWarmupCallback
from hvdtrain.keras.callbacks.metric_average import MetricAverageCallback
from hvdtrain.keras.callbacks.rank_zero import BestModelCheckpoint, RankZeroCallback

__all__ = [
    "AverageBatchNormStatistics",
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "Checkpoint",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "RandomStatesCallback",
    "RankZeroCallback",
    "distributed",
]
