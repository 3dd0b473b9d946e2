"""What scripts of TensorFlow 1 call; where it has no meaning any more, one sentence says what to write instead."""

from typing import Any

import tensorflow as tf

from hvdtrain.tensorflow.functions import broadcast_variables

_INSTEAD = (
    "there are no global variables outside a graph of TensorFlow 1. Call hvd.broadcast_variables(model.variables, "
    "root_rank=0) and hvd.broadcast_variables(optimizer.variables, root_rank=0) instead, or give model.fit the "
    "callback hvd.callbacks.BroadcastGlobalVariablesCallback(0)."
)


def broadcast_global_variables(root_rank: int) -> Any:
    """Give all global variables of a TensorFlow 1 graph the values of one rank.

    Args:
        root_rank: The rank whose values all take.

    Returns:
        The operation to run.

    Raises:
        RuntimeError: Outside such a graph; the message says what to call instead.
    """
    if tf.executing_eagerly():
        raise RuntimeError(f"hvd.broadcast_global_variables: {_INSTEAD}")
    return broadcast_variables(tf.compat.v1.global_variables(), root_rank)


class BroadcastGlobalVariablesHook(tf.compat.v1.train.SessionRunHook):
    """Gives all global variables the values of one rank when a `MonitoredSession` of TensorFlow 1 starts.

    Args:
        root_rank: The rank whose values all take.
        device: Where the operation is placed.

    Raises:
        RuntimeError: Outside a graph of TensorFlow 1; the message says what to call instead.
    """

    def __init__(self, root_rank: int, device: str = "") -> None:
        if tf.executing_eagerly():
            raise RuntimeError(f"hvd.BroadcastGlobalVariablesHook: {_INSTEAD}")
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        self.bcast_op: Any = None

    def begin(self) -> None:
        """Add the operation to the graph before it is closed."""
        with tf.device(self.device):
            self.bcast_op = broadcast_global_variables(self.root_rank)

    def after_create_session(self, session: Any, coord: Any) -> None:
        """Run the operation."""
        session.run(self.bcast_op)
