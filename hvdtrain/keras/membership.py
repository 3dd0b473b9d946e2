"""Find the ranks that train a model together: all ranks, or the process set of its optimizer."""

from typing import Any

from hvdtrain.collectives.engine import Engine
from hvdtrain.keras.optimizer.distributed import is_distributed
from hvdtrain.runtime import process_sets
from hvdtrain.runtime.process_sets import ProcessSet


def optimizers_of(model: Any) -> list[Any]:
    """List a model's optimizers: the compiled one, and others in attributes, as in a GAN."""
    distributed = [value for value in vars(model).values() if is_distributed(value)]
    compiled = getattr(model, "optimizer", None)  # a model that only predicts has none
    return distributed or ([] if compiled is None else [compiled])


def process_set_of(model: Any) -> ProcessSet:
    """Return the process set of a model's optimizers; the global process set if they have none."""
    for optimizer in optimizers_of(model):
        process_set = getattr(optimizer, "process_set", None)
        if process_set is not None:
            return process_set
    return process_sets.global_process_set


def engine_of(model: Any) -> Engine:
    """Return the engine of the ranks that train a model together; one of size 1 on a rank outside the set."""
    return process_sets.engine_or_alone(process_set_of(model))


def writes(model: Any) -> bool:
    """Return whether this rank writes the files for all ranks that train the model."""
    return process_set_of(model).included() is not False and engine_of(model).rank == 0
