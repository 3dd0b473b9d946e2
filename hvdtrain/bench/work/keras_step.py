"""Train with Keras 3: without hvdtrain, averaged over ranks by hvdtrain, or with hvdtrain but without exchange."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvdtrain.bench.models.keras_models import compiled

PLAIN, WRAPPED, COMPUTE_ONLY = "plain", "wrapped", "compute_only"


def prepare(settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict]:
    """Build the model, the same on all ranks.

    Args:
        settings: `model`, one of `WORKLOADS`; `mode`: "plain" for Keras alone, "wrapped" for hvdtrain in one
            process, "averaged" for hvdtrain, "compute_only" for hvdtrain without exchange between ranks; `xla`:
            whether XLA compiles the step.

    Returns:
        A function that answers requests.
    """
    import keras

    from hvdtrain.bench.work.keras_steps import KerasSteps

    distribute = _distribution(settings)
    keras.utils.set_random_seed(0)
    model = compiled(keras, settings["model"], distribute, settings.get("xla", False))
    plain = settings["mode"] == PLAIN
    fit_arguments = None if plain else functools.partial(_sharded, settings["model"])
    return KerasSteps(keras, model, settings, fit_arguments=fit_arguments).worker()


def _sharded(model: str, batch: int, steps: int) -> dict[str, Any]:
    import hvdtrain.keras as hvd
    from hvdtrain.bench.work.keras_steps import samples

    global_batch = batch * hvd.size()
    return {"x": hvd.shard(samples(model, global_batch, steps, 0), batch_size=global_batch)}


def _distribution(settings: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return the function that wraps the optimizer; set the number of threads before anything is computed."""
    from hvdtrain.bench.work.keras_steps import take_threads

    if settings["mode"] in (PLAIN, WRAPPED):
        take_threads(settings)
    if settings["mode"] == PLAIN:
        return lambda optimizer: optimizer
    import hvdtrain.keras as hvd

    hvd.init()
    return _without_exchange if settings["mode"] == COMPUTE_ONLY else hvd.DistributedOptimizer


def _without_exchange(optimizer: Any) -> Any:
    """Return the distributed optimizer with everything but the exchange of gradients."""
    import hvdtrain.keras as hvd

    distributed = hvd.DistributedOptimizer(optimizer)
    object.__setattr__(distributed, "_hvdtrain_reducer", _LocalReducer(distributed._hvdtrain_reducer))
    return distributed


class _LocalReducer:
    """A reducer that returns the rank's own gradients; all other attributes are those of the given reducer."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any], state: Sequence[Any]) -> list[Any]:
        return list(gradients)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)
