"""Provide training that resumes from its last commit: `from hvdtrain.keras import elastic`."""

from hvdtrain.keras.elastic.callbacks import (
    CommitStateCallback,
    UpdateBatchStateCallback,
    UpdateEpochStateCallback,
)
from hvdtrain.keras.elastic.events import HorovodInternalError, HostsUpdatedInterrupt
from hvdtrain.keras.elastic.model import KerasState, TensorFlowKerasState
from hvdtrain.keras.elastic.running import run
from hvdtrain.keras.elastic.state import ObjectState, State
from hvdtrain.keras.elastic.variables import TensorFlowState

__all__ = [
    "CommitStateCallback",
    "HorovodInternalError",
    "HostsUpdatedInterrupt",
    "KerasState",
    "ObjectState",
    "State",
    "TensorFlowKerasState",
    "TensorFlowState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]
