"""Where Keras learns to read what `hvd.shard` returns: four of its functions, each for sharded data only."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import keras
from keras.src.trainers import compile_utils, data_adapters

from hvdtrain import runtime
from hvdtrain.data import exact
from hvdtrain.data.adapters import DatasetAdapter, TFAdapter
from hvdtrain.data.datasets import ShardedTFDataset
from hvdtrain.data.fingerprint import Fingerprint
from hvdtrain.data.following import Follow, preceded
from hvdtrain.data.generators import ShardedGenerator
from hvdtrain.data.position import Position
from hvdtrain.data.sharded import ShardedDataset
from hvdtrain.replacing import replace_where_defined

Sharded = ShardedDataset | ShardedTFDataset | ShardedGenerator

_watcher: ContextVar[list[Fingerprint] | None] = ContextVar("what notes the data of a fit", default=None)
_installed = False


def install() -> None:
    """Puts the changes into Keras; once is enough.

    - `get_data_adapter` shuffles the batches of a PyDataset with each process's own `random`, and refuses
      `class_weight` where there are weights. Sharded data has its own order and takes both.
    - `fit` and `evaluate` tell sharded data that the model's steps understand filler.
    - `Mean.update_state` and `CompileMetrics.update_state` then leave filler out: see `exact.py`.
    """
    global _installed
    if _installed:
        return
    _installed = True
    data_adapters.get_data_adapter = _adapting(data_adapters.get_data_adapter)
    replace_where_defined(keras.Model, "fit", _exactly)
    replace_where_defined(keras.Model, "evaluate", _exactly)
    keras.metrics.Mean.update_state = exact.mean_update(keras.metrics.Mean.update_state)
    compile_metrics = compile_utils.CompileMetrics
    compile_metrics.update_state = exact.metrics_update(compile_metrics.update_state)


def _adapting(get_data_adapter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_data_adapter)
    def choose(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Sharded):
            return _watched(get_data_adapter(x, *args, **kwargs))
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
        data = x.reading(position, run.window if training else None, run.exact, given.get("class_weight"))
        if isinstance(x, ShardedDataset):
            return DatasetAdapter(data, data, training)
        return TFAdapter(data, x, training, run.window if training else None)

    return choose


@dataclass
class _Run:
    """What a `fit` or `evaluate` tells the adapters that are made within it."""

    exact: bool = False
    training: Any = None
    window: int | None = None


_run: ContextVar[_Run] = ContextVar("the fit or evaluate that runs", default=_Run())  # noqa: B039


@contextlib.contextmanager
def watching(fingerprint: Fingerprint) -> Iterator[None]:
    """Notes the first batches that a `fit` within this context trains on; needs `install()`."""
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

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        x, validation = given.arguments.get("x"), given.arguments.get("validation_data")
        sharded = [each for each in (x, validation) if isinstance(each, Sharded)]
        if not sharded:
            return method(self, *args, **kwargs)
        _prepare(self, sharded)
        this = _Run(exact=True)
        if isinstance(x, Sharded) and "epochs" in signature.parameters:
            given.arguments["callbacks"] = preceded(self, given.arguments.get("callbacks"), Follow(x))
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


def _prepare(model: keras.Model, sharded: list[Any]) -> None:
    if runtime.engine().size == 1 or not any(each.partial for each in sharded):
        return
    exact.attach(model)
    if getattr(model, "jit_compile", False):
        model.jit_compile = False  # leaving rows out is nothing XLA can compile
        runtime.engine().say(
            "jit_compile is turned off for this model: the last batch of hvd.shard is not full. With "
            "hvd.shard(…, remainder='drop') or 'pad' it can stay on."
        )
    others = [
        each
        for each in keras.tree.flatten(getattr(model, "loss", None))
        if getattr(each, "reduction", "mean") not in ("sum_over_batch_size", "mean")
    ]
    if others and runtime.engine().rank == 0:
        warnings.warn(
            f"{type(others[0]).__name__} has reduction={others[0].reduction!r}. A last batch that is not full is "
            "averaged right over its samples only with 'sum_over_batch_size'; or use "
            "hvd.shard(…, remainder='drop').",
            stacklevel=3,
        )
