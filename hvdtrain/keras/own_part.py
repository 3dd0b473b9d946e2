"""Says once where `evaluate` and `predict` of sharded data give a rank's part, and what gives the whole."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras

from hvdtrain import runtime
from hvdtrain.data.seams import Sharded
from hvdtrain.keras.callbacks.distributed import Together
from hvdtrain.keras.callbacks.metric_average import MetricAverageCallback

_SENTENCES = {
    "evaluate": (
        "model.evaluate with what hvd.shard returned measures each rank's part. hvd.evaluate(model, data) "
        "measures the whole, on all ranks together."
    ),
    "predict": (
        "model.predict with what hvd.shard returned predicts each rank's part, with filler, and in its own order. "
        "hvd.predict(model, data), with the data as they were before hvd.shard, predicts all, in order."
    ),
}
_installed = False
_said: set[str] = set()


def install() -> None:
    """Makes `evaluate` and `predict` speak; once is enough."""
    global _installed
    if _installed:
        return
    _installed = True
    trainer = next(each for each in keras.Model.__mro__ if "fit" in vars(each))
    for name in _SENTENCES:
        setattr(trainer, name, _saying(name, getattr(trainer, name)))


def _saying(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if isinstance(given.get("x"), Sharded) and name not in _said and not _together(given):
            _said.add(name)
            if runtime.engine().size > 1:
                runtime.engine().say(_SENTENCES[name])
        return method(self, *args, **kwargs)

    return run


def _together(given: dict[str, Any]) -> bool:
    """Tells whether the ranks combine what they measure: in a `fit`, or by a callback."""
    callbacks = given.get("callbacks")
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return True  # of a fit
    return any(
        isinstance(each, (MetricAverageCallback, Together)) for each in keras.tree.flatten(callbacks or [])
    )
