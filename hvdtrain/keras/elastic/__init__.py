"""Provide training that resumes from its last commit: `from hvdtrain.keras import elastic`."""

from hvdtrain.collectives.errors import HorovodInternalError, HostsUpdatedInterrupt
from hvdtrain.keras.elastic.callbacks import (
    CommitStateCallback,
    UpdateBatchStateCallback,
    UpdateEpochStateCallback,
)
from hvdtrain.keras.elastic.model_states import KerasState, TensorFlowKerasState, TensorFlowState
from hvdtrain.keras.elastic.running import run
from hvdtrain.keras.elastic.state import ObjectState, State

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
