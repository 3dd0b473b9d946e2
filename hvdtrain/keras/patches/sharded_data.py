"""Make Keras read the data that `hvd.shard` returns, and start each epoch without a pause.

- `get_data_adapter`. Keras shuffles the batches of a `PyDataset` with the `random` module of each process, so
  every rank would get another order, and refuses `class_weight` for data with sample weights. Replacement:
  sharded data is read in its own order, the same on all ranks, and takes both weights. The first batches of
  other data are recorded for the comparison in `model_fit.py`.
- `Model.evaluate`, and `Model.fit` as a part of `model_fit.py`. Keras averages over the batch of one process, but
  the ranks' parts of a global batch may differ in size. Replacement: on several ranks the model's steps get the
  number of samples of this rank and of the global batch.
- `Mean.update_state` and `CompileMetrics.update_state`. Keras counts a batch also if this rank has no sample
  of the global batch. Replacement: only samples are counted, see `data/global_batch.py`.
- `Loss.__call__` and `Model._aggregate_additional_loss` (from Keras 3.6 on). Keras knows the samples of one
  process. Replacement: losses that are sums over samples are scaled, see `data/losses.py`.
- `apply_mask`, `reduce_values` and `reduce_weighted_values` of losses. Keras divides by the valid steps and the
  weights of one process. Replacement: they are counted on all ranks; weights along other axes are refused.
- `TFEpochIterator._get_iterator`. Keras lets `tf.data` tune itself, which delays the start of an epoch on one
  rank, and the other ranks wait. Replacement: tuning is off, for data of all kinds; see `untuned` in
  `data/adapters.py`.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from keras.src.losses import loss as keras_loss
from keras.src.trainers import compile_utils, data_adapters

from hvdtrain import runtime
from hvdtrain.data import losses
from hvdtrain.data.adapters import DatasetAdapter, Follow, TFAdapter, preceded, untuned
from hvdtrain.data.fingerprint import Fingerprint
from hvdtrain.data.global_batch import (
    Dealt,
    GlobalBatch,
    during,
    mean_update,
    metrics_update,
    weighted_statistics,
)
from hvdtrain.data.sample_plan import Position
from hvdtrain.data.shard import Sharded
from hvdtrain.data.sharded_dataset import ShardedDataset
from hvdtrain.patching import replace, replace_where_defined

_watcher: ContextVar[list[Fingerprint] | None] = ContextVar("what notes the data of a fit", default=None)


@functools.cache
def install() -> None:
    """Replace the functions that the docstring of this module lists. A second call has no effect."""
    replace(data_adapters, "get_data_adapter", _adapting_sharded_data)
    replace_where_defined(keras.Model, "evaluate", counting_samples)
    replace(TFEpochIterator, "_get_iterator", untuned)
    replace(keras.metrics.Mean, "update_state", mean_update)
    replace(compile_utils.CompileMetrics, "update_state", metrics_update)
    replace(keras.Loss, "__call__", losses.of_all_samples)
    if hasattr(keras.Model, "_aggregate_additional_loss"):
        replace_where_defined(keras.Model, "_aggregate_additional_loss", losses.added_of_all_samples)
    replace(keras_loss, "apply_mask", losses.over_all_valid_steps)
    replace(keras_loss, "reduce_values", losses.over_all_weights)
    replace(keras_loss, "reduce_weighted_values", losses.with_weights_of_samples)


def _adapting_sharded_data(get_data_adapter: Callable[..., Any]) -> Callable[..., Any]:
    def get_adapter(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Sharded):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                adapter = get_data_adapter(x, *args, **kwargs)
            for warning in caught:  # Keras would name its caller, which is this function
                warnings.warn(warning.message, stacklevel=2)
            return _record_batches(adapter)
        given = inspect.signature(get_data_adapter).bind(x, *args, **kwargs).arguments
        for name in ("y", "sample_weight"):
            if given.get(name) is not None:
                raise ValueError(
                    f"The data that hvd.shard returned already contains {name}. Received another {name}: leave it "
                    "out, or pass it to hvd.shard((x, y, sample_weight), …)."
                )
        run = _run.get()
        training = x is run.training
        if training:
            run.training = None  # the same data may also be the validation data, whose adapter is made second
            (_watcher.get() or []).clear()
        position = x.position if training else Position(x.position.epoch)
        data = x.reading(position, run.window if training else None, run.dealt, given.get("class_weight"))
        if isinstance(x, ShardedDataset):
            return DatasetAdapter(data, data, training)
        return TFAdapter(data, x, training, run.window if training else None)

    return get_adapter


@dataclass
class _Run:
    """Settings of a `fit` or `evaluate`, for the data adapters that Keras creates within it.

    Args:
        dealt: Whether the steps of the model get the numbers of samples.
        training: The sharded training data, until its adapter has been created.
        window: `steps_per_epoch` of `fit`, if the sharded data has a length.
    """

    dealt: bool = False
    training: Any = None
    window: int | None = None


_run: ContextVar[_Run] = ContextVar("the fit or evaluate that runs", default=_Run())  # noqa: B039


@contextlib.contextmanager
def watching(fingerprint: Fingerprint) -> Iterator[None]:
    """Record the first batches that a `fit` within this context trains on; requires `install()`."""
    token = _watcher.set([fingerprint])
    try:
        yield
    finally:
        _watcher.reset(token)


def _record_batches(adapter: Any) -> Any:
    watcher = _watcher.get()
    if watcher:
        # `fit` creates two adapters: the first for training, the second for validation.
        fingerprint = watcher.pop()
        get_tf_dataset = adapter.get_tf_dataset
        adapter.get_tf_dataset = lambda: fingerprint.over(get_tf_dataset())
    return adapter


def counting_samples(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fit` or `evaluate` that tells the model's steps how many samples this rank holds."""
    signature = inspect.signature(method)
    trains = "epochs" in signature.parameters

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        x, validation = given.arguments.get("x"), given.arguments.get("validation_data")
        sharded = [data for data in (x, validation) if isinstance(data, Sharded)]
        if not sharded:
            return method(self, *args, **kwargs)
        if isinstance(x, Sharded) and not _run.get().dealt:  # within `fit`, Keras passes its own batch_size
            _refuse_unused(method.__name__, given.arguments)
        new_run = _Run(dealt=True)
        several_ranks = runtime.engine().size > 1
        if several_ranks:
            together = trains or is_of_all_ranks(given.arguments.get("callbacks"))
            evaluated = validation if trains else x
            _attach(self, "test", _Setting(getattr(evaluated, "partial", False), together))
        if several_ranks and trains:
            _attach(self, "train", _Setting(getattr(x, "partial", False), together))
        if trains and isinstance(x, Sharded):
            known = self.train_step.hvdtrain_losses if several_ranks else None
            given.arguments["callbacks"] = preceded(self, given.arguments.get("callbacks"), Follow(x, known))
            new_run.training = x
            if x.steps is not None:
                # Keras would continue one iterator over all epochs, which keeps the order of the first epoch.
                new_run.window = given.arguments.pop("steps_per_epoch", None)
        token = _run.set(new_run)
        try:
            return method(*given.args, **given.kwargs)
        finally:
            _run.reset(token)

    return run


def _refuse_unused(name: str, given: Mapping[str, Any]) -> None:
    """Raise an error for arguments that apply only to arrays, instead of ignoring them silently."""
    if given.get("validation_split"):
        raise ValueError(
            f"model.{name}: validation_split={given['validation_split']} cannot divide data of hvd.shard. "
            "Divide the arrays before hvd.shard, and give validation_data=hvd.shard((x_val, y_val), ...)."
        )
    if given.get("batch_size") is not None:
        raise ValueError(
            f"model.{name}: batch_size={given['batch_size']} has no effect on data of hvd.shard. Give the global "
            "batch to hvd.shard(..., batch_size=...), and validation_batch_size for validation arrays."
        )


def is_of_all_ranks(callbacks: Any) -> bool:
    """Return whether all ranks evaluate together: in `fit`, or with a callback that combines their metrics."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return True
    return any(getattr(callback, "combines_ranks", False) for callback in keras.tree.flatten(callbacks or []))


class _Setting(NamedTuple):
    """Settings with which a model's steps are traced.

    Args:
        partial: Whether a global batch may not be full.
        together: Whether all ranks run the steps.
    """

    partial: bool
    together: bool


def _attach(model: keras.Model, kind: str, setting: _Setting) -> None:
    """Make a model's "train" or "test" step accept the batches of `hvd.shard`; others are passed on unchanged."""
    original = getattr(model, f"{kind}_step")
    known = getattr(original, "hvdtrain_losses", None) or losses.Losses()
    if getattr(original, "hvdtrain_setting", None) == setting:
        return
    while hasattr(original, "hvdtrain_setting"):
        original = original.__wrapped__
    setattr(model, f"{kind}_step", _accepting_sharded_batches(model, original, setting, known))
    # A function that was traced before would keep the old settings.
    setattr(model, f"{kind}_function", None)


def _accepting_sharded_batches(
    model: keras.Model, original: Callable[[Any], Any], setting: _Setting, known: losses.Losses
) -> Callable[[Any], Any]:
    @functools.wraps(original)
    def step(data: Any) -> Any:
        if not isinstance(data, Dealt):
            return original(data)
        known.added = 0
        own, total = tf.unstack(tf.cast(tf.ensure_shape(data.samples, [2]), tf.int64))
        global_batch = GlobalBatch(model, runtime.engine(), data.batch, own, total, *setting, known)
        with during(global_batch), weighted_statistics(global_batch):
            return original(data.batch)

    step.hvdtrain_setting = setting  # type: ignore[attr-defined]
    step.hvdtrain_losses = known  # type: ignore[attr-defined]
    return step
