"""Variables that must be the same everywhere, made so."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvdtrain.gradients.naming import described_call
from hvdtrain.gradients.trained_variables import NOTHING, registry
from hvdtrain.runtime.process_sets import ProcessSet, engine_of, global_process_set


def broadcast_variables(
    variables: Sequence[Any],
    root_rank: int = 0,
    process_set: ProcessSet = global_process_set,
    inplace: bool = False,
) -> None:
    """Give the variables of all ranks the values of one; for training loops of your own.

    Args:
        variables: Keras or TensorFlow variables, the same list on all ranks: `model.weights`,
            `optimizer.variables`.
        root_rank: The rank whose values all take.
        process_set: The ranks among which they are broadcast; only these call this.
        inplace: Accepted for Horovod's sake; no variable is made anew either way.

    Raises:
        ValueError: If there is no such rank, or `hvd.init()` was not called.
        MismatchError: On every rank, if the ranks hold other variables, shapes or dtypes.
    """
    engine = engine_of(process_set)
    root = engine.check_root(root_rank, "broadcast_variables")
    if engine.size > 1 and not variables:
        engine.say(NOTHING)
    details = [f"{each.dtype} {tuple(each.shape)}" for each in variables]
    engine.agree(described_call("broadcast of variables", variables, details, weights_only=False))
    for variable in variables:
        value = engine.broadcast(np.asarray(variable.numpy()), root_rank)
        if engine.rank != root:
            variable.assign(value)
    if engine.size > 1:
        registry.note_broadcast(engine, variables)
