"""Steps of Keras 3: plain, averaged over the ranks by hvdtrain, or made for that with the averaging left out."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvdtrain.bench.models.keras_models import compiled

PLAIN, WRAPPED, AVERAGED, SILENT = "plain", "wrapped", "averaged", "silent"


def prepare(settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict]:
    """Builds the model, the same on all ranks.

    Args:
        settings: `model`, one of `WORKLOADS`; `way`: "plain" for Keras alone, "wrapped" for hvdtrain in one
            process, "averaged" for hvdtrain, "silent" for hvdtrain whose ranks tell each other nothing; `xla`:
            whether XLA compiles the step.

    Returns:
        What answers requests.
    """
    import keras

    from hvdtrain.bench.work.keras_steps import KerasSteps

    distribute = _distribution(settings)
    keras.utils.set_random_seed(0)
    model = compiled(keras, settings["model"], distribute, settings.get("xla", False))
    feed = None if settings["way"] == PLAIN else functools.partial(_sharded, settings["model"])
    return KerasSteps(keras, model, settings, feed=feed).answering()


def _sharded(model: str, batch: int, steps: int) -> dict[str, Any]:
    import hvdtrain.keras as hvd
    from hvdtrain.bench.work.keras_steps import samples

    whole = batch * hvd.size()
    return {"x": hvd.shard(samples(model, whole, steps, 0), batch_size=whole)}


def _distribution(settings: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Returns what becomes of the optimizer, and takes this rank's threads, before anything is computed."""
    from hvdtrain.bench.work.keras_steps import take_threads

    if settings["way"] in (PLAIN, WRAPPED):
        take_threads(settings)
    if settings["way"] == PLAIN:
        return lambda optimizer: optimizer
    import hvdtrain.keras as hvd

    hvd.init()
    return _silent if settings["way"] == SILENT else hvd.DistributedOptimizer


def _silent(optimizer: Any) -> Any:
    """Leaves everything as it is but the way to the other ranks."""
    import hvdtrain.keras as hvd

    distributed = hvd.DistributedOptimizer(optimizer)
    object.__setattr__(distributed, "_hvdtrain_reducer", _Own(distributed._hvdtrain_reducer))
    return distributed


class _Own:
    """Keeps a rank's own gradients; in everything else it is the reducer that it stands in for."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any], state: Sequence[Any]) -> list[Any]:
        return list(gradients)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)
