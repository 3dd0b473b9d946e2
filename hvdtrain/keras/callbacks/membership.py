"""Which ranks train a model together: the whole world, or the process set of its optimizer."""

from typing import Any

from hvdtrain.collectives.engine import Engine
from hvdtrain.keras.optimizer.distributed import is_distributed
from hvdtrain.runtime import process_sets
from hvdtrain.runtime.process_sets import ProcessSet


def optimizers_of(model: Any) -> list[Any]:
    """List a model's optimizers: the compiled one, and those that a GAN or its like keeps beside it."""
    distributed = [each for each in vars(model).values() if is_distributed(each)]
    compiled = getattr(model, "optimizer", None)  # a model that only predicts has none
    return distributed or [each for each in [compiled] if each is not None]


def process_set_of(model: Any) -> ProcessSet:
    """Return the process set of a model's optimizers; the global one where they have none."""
    chosen = [getattr(each, "process_set", None) for each in optimizers_of(model)]
    return next((each for each in chosen if each is not None), process_sets.global_process_set)


def engine_of(model: Any) -> Engine:
    """Return the engine of the ranks that train a model together: a world of one on a rank outside the set."""
    return process_sets.engine_or_alone(process_set_of(model))


def writes(model: Any) -> bool:
    """Return whether this rank is the one that writes files for all that train a model together."""
    return process_set_of(model).included() is not False and engine_of(model).rank == 0
