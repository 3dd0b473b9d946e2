"""Copy the values of variables from one rank to all."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
from hvdtrain.gradients.naming import described_call
from hvdtrain.gradients.trained_variables import NOTHING, registry
from hvdtrain.runtime.process_sets import ProcessSet, engine_of, global_process_set


def broadcast_variables(
    variables: Sequence[Any],
    root_rank: int = 0,
    process_set: ProcessSet = global_process_set,
    inplace: bool = False,
) -> None:
    """Set the variables of all ranks to the values of one rank; for custom training loops.

    Args:
        variables: Keras or TensorFlow variables, the same list on all ranks: `model.weights`,
            `optimizer.variables`.
        root_rank: The rank whose values are copied.
        process_set: The ranks that take part; only these call this.
        inplace: Accepted for compatibility with Horovod; variables are always assigned in place.

    Raises:
        ValueError: If there is no such rank, or `hvd.init()` was not called.
        MismatchError: On every rank, if the variables, shapes or dtypes differ between the ranks.
    """
    engine = engine_of(process_set)
    root = engine.check_root(root_rank, "broadcast_variables")
    if engine.size > 1 and not variables:
        engine.warn(NOTHING)
    details = [f"{variable.dtype} {tuple(variable.shape)}" for variable in variables]
    engine.agree(described_call("broadcast of variables", variables, details, weights_only=False))
    for variable in variables:
        value = engine.broadcast(np.asarray(variable.numpy()), root_rank)
        if engine.rank != root:
            variable.assign(value)
    if engine.size > 1:
        registry.note_broadcast(engine, TensorFlowBridge().readable(variables))
