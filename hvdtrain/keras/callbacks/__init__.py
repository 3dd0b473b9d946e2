"""Provide callbacks for `model.fit` on several ranks, one per file."""

from hvdtrain.keras.callbacks.batch_norm import AverageBatchNormStatistics
from hvdtrain.keras.callbacks.best_model import BestModelCheckpoint
from hvdtrain.keras.callbacks.broadcast import BroadcastGlobalVariablesCallback
from hvdtrain.keras.callbacks.checkpoint import Checkpoint
from hvdtrain.keras.callbacks.distributed import distributed
from hvdtrain.keras.callbacks.learning_rate import LearningRateScheduleCallback, LearningRateWarmupCallback
from hvdtrain.keras.callbacks.metric_average import MetricAverageCallback
from hvdtrain.keras.callbacks.random_states import RandomStatesCallback
from hvdtrain.keras.callbacks.rank_zero import RankZeroCallback

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
