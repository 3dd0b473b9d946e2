"""Where Keras learns to read what `hvd.shard` returns, and to start an epoch of any data without a pause."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from keras.src.trainers import compile_utils, data_adapters

from hvdtrain import runtime
from hvdtrain.data import losses
from hvdtrain.data.adapters import DatasetAdapter, TFAdapter, untuned
from hvdtrain.data.callback_order import Follow, preceded
from hvdtrain.data.fingerprint import Fingerprint
from hvdtrain.data.global_batch import (
    Dealt,
    GlobalBatch,
    during,
    mean_update,
    metrics_update,
    weighted_statistics,
)
from hvdtrain.data.position import Position
from hvdtrain.data.shard import Sharded
from hvdtrain.data.sharded_dataset import ShardedDataset
from hvdtrain.patching import replace, replace_where_defined

_watcher: ContextVar[list[Fingerprint] | None] = ContextVar("what notes the data of a fit", default=None)
_installed = False


def install() -> None:
    """Put the changes into Keras; once is enough.

    - `get_data_adapter` shuffles the batches of a PyDataset with each process's own `random`, and refuses
      `class_weight` where there are weights. Sharded data has its own order and takes both.
    - `fit` and `evaluate` tell the model's steps how many samples of the global batch this rank holds.
    - `TFEpochIterator` reads data of all kinds without the pause between epochs: see `adapters.untuned`.
    - `Mean.update_state` and `CompileMetrics.update_state` count samples where a rank holds none: see
      `global_batch.py`; losses are those of the global batch: see `losses.py`.
    """
    global _installed
    if _installed:
        return
    _installed = True
    replace(data_adapters, "get_data_adapter", _adapting)
    replace_where_defined(keras.Model, "fit", _exactly)
    replace_where_defined(keras.Model, "evaluate", _exactly)
    replace(TFEpochIterator, "_get_iterator", untuned)
    replace(keras.metrics.Mean, "update_state", mean_update)
    replace(compile_utils.CompileMetrics, "update_state", metrics_update)
    losses.install()


def _adapting(get_data_adapter: Callable[..., Any]) -> Callable[..., Any]:
    def choose(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Sharded):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                adapter = get_data_adapter(x, *args, **kwargs)
            for warning in told:  # Keras warns in the name of its caller, which is this function
                warnings.warn(warning.message, stacklevel=2)
            return _watched(adapter)
        given = inspect.signature(get_data_adapter).bind(x, *args, **kwargs).arguments
        for name in ("y", "sample_weight"):
            if given.get(name) is not None:
                raise ValueError(
                    f"What hvd.shard returned holds its {name} already. Received {name} beside it: leave it "
                    "out, or give it to hvd.shard((x, y, sample_weight), …)."
                )
        run = _run.get()
        training = x is run.training
        if training:
            run.training = None  # so that the same data may be for validation, which comes second
            (_watcher.get() or []).clear()
        position = x.position if training else Position(x.position.epoch)
        data = x.reading(position, run.window if training else None, run.dealt, given.get("class_weight"))
        if isinstance(x, ShardedDataset):
            return DatasetAdapter(data, data, training)
        return TFAdapter(data, x, training, run.window if training else None)

    return choose


@dataclass
class _Run:
    """What a `fit` or `evaluate` tells the adapters that are made within it."""

    dealt: bool = False
    training: Any = None
    window: int | None = None


_run: ContextVar[_Run] = ContextVar("the fit or evaluate that runs", default=_Run())  # noqa: B039


@contextlib.contextmanager
def watching(fingerprint: Fingerprint) -> Iterator[None]:
    """Note the first batches that a `fit` within this context trains on; needs `install()`."""
    token = _watcher.set([fingerprint])
    try:
        yield
    finally:
        _watcher.reset(token)


def _watched(adapter: Any) -> Any:
    watcher = _watcher.get()
    if watcher:
        # Of a fit's two adapters the first is for training, the other for validation.
        fingerprint = watcher.pop()
        get_tf_dataset = adapter.get_tf_dataset
        adapter.get_tf_dataset = lambda: fingerprint.over(get_tf_dataset())
    return adapter


def _exactly(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)
    trains = "epochs" in signature.parameters

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        x, validation = given.arguments.get("x"), given.arguments.get("validation_data")
        sharded = [data for data in (x, validation) if isinstance(data, Sharded)]
        if not sharded:
            return method(self, *args, **kwargs)
        if isinstance(x, Sharded) and not _run.get().dealt:  # within `fit`, Keras hands its own batch_size on
            _refuse_unused(method.__name__, given.arguments)
        this = _Run(dealt=True)
        several = runtime.engine().size > 1
        if several:
            together = trains or is_of_all_ranks(given.arguments.get("callbacks"))
            evaluated = validation if trains else x
            _attach(self, "test", _Setting(getattr(evaluated, "partial", False), together))
        if several and trains:
            _attach(self, "train", _Setting(getattr(x, "partial", False), together))
        if trains and isinstance(x, Sharded):
            known = self.train_step.hvdtrain_losses if several else None
            given.arguments["callbacks"] = preceded(self, given.arguments.get("callbacks"), Follow(x, known))
            this.training = x
            if x.steps is not None:
                # Keras would go on with one reading of the data, which knows nothing of the next epoch's order.
                this.window = given.arguments.pop("steps_per_epoch", None)
        token = _run.set(this)
        try:
            return method(*given.args, **given.kwargs)
        finally:
            _run.reset(token)

    return run


def _refuse_unused(name: str, given: Mapping[str, Any]) -> None:
    """Raise an error for arguments that only arrays can have, instead of leaving them out without a word."""
    if given.get("validation_split"):
        raise ValueError(
            f"model.{name}: validation_split={given['validation_split']} cannot divide what hvd.shard returned. "
            "Divide the arrays before hvd.shard, and give validation_data=hvd.shard((x_val, y_val), ...)."
        )
    if given.get("batch_size") is not None:
        raise ValueError(
            f"model.{name}: batch_size={given['batch_size']} has no effect on what hvd.shard returned. Give the "
            "global batch to hvd.shard(..., batch_size=...), and validation_batch_size for validation arrays."
        )


def is_of_all_ranks(callbacks: Any) -> bool:
    """Tell whether all ranks evaluate together: within a `fit`, or with a callback that combines their metrics."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return True
    return any(getattr(callback, "combines_ranks", False) for callback in keras.tree.flatten(callbacks or []))


@dataclass
class _Setting:
    """What a model's steps depend on beside their batches.

    Args:
        partial: Whether some global batch may be not full.
        together: Whether all ranks run the steps.
    """

    partial: bool
    together: bool


def _attach(model: keras.Model, kind: str, setting: _Setting) -> None:
    """Make a model's step take what `hvd.shard` deals; all other batches go through unchanged.

    Args:
        model: The model.
        kind: "train" or "test".
        setting: What the step depends on.
    """
    original = getattr(model, f"{kind}_step")
    known = getattr(original, "hvdtrain_losses", None) or losses.Losses()
    if getattr(original, "hvdtrain_setting", None) == setting:
        return
    while hasattr(original, "hvdtrain_setting"):
        original = original.__wrapped__
    setattr(model, f"{kind}_step", _on_dealt(model, original, setting, known))
    # What was traced before goes on with the setting of then.
    setattr(model, f"{kind}_function", None)


def _on_dealt(
    model: keras.Model, original: Callable[[Any], Any], setting: _Setting, known: losses.Losses
) -> Callable[[Any], Any]:
    @functools.wraps(original)
    def step(data: Any) -> Any:
        if not isinstance(data, Dealt):
            return original(data)
        known.added = 0
        own, total = tf.unstack(tf.cast(tf.ensure_shape(data.samples, [2]), tf.int64))
        this = GlobalBatch(
            model, runtime.engine(), data.batch, own, total, setting.partial, setting.together, known
        )
        with during(this), weighted_statistics(this):
            return original(data.batch)

    step.hvdtrain_setting = setting  # type: ignore[attr-defined]
    step.hvdtrain_losses = known  # type: ignore[attr-defined]
    return step
