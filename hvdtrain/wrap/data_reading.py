"""Change how Keras reads data: all ranks get the same batches, those of rank 0 where batches may differ."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import tensorflow as tf
from keras.src.trainers import data_adapters

from hvdtrain.collectives.engine import Engine
from hvdtrain.patching import replace
from hvdtrain.wrap import context, same_batches

# For each method of a model the steps for which Keras reads data, in order.
_FIRST_READS = {
    "fit": ["train_step", "test_step"],
    "evaluate": ["test_step"],
    "predict": ["predict_step"],
    "train_on_batch": [],
    "test_on_batch": [],
}

# For each model the steps that first receive the batch of rank 0.
_shared: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


@dataclass
class _Reader:
    """A model that reads data.

    Args:
        model: The model.
        steps: The steps that will read data, in order; the last one may read several times.
        scale: Factor of the size of training batches.
    """

    model: Any
    steps: list[str]
    scale: int = 1

    def next_step(self) -> str | None:
        """Return the name of the step that reads next, None if no step reads."""
        return self.steps.pop(0) if len(self.steps) > 1 else next(iter(self.steps), None)


_reader: ContextVar[_Reader | None] = ContextVar("the model that reads", default=None)


def install(engine: Engine) -> None:
    """Change how Keras chooses a data adapter."""
    replace(data_adapters, "get_data_adapter", lambda choose: _with_equal_batches(engine, choose))


@contextlib.contextmanager
def of(model: Any, method: str) -> Iterator[None]:
    """Set the model and the method that read data during this context."""
    for name in ("train_step", "test_step", "predict_step"):
        step = getattr(model, name)
        if not hasattr(step, "hvdtrain_wrapped"):
            # Set on the instance, because scripts override the method in their classes.
            vars(model)[name] = _with_received_batch(model, name, step)
    token = _reader.set(_Reader(model, list(_FIRST_READS.get(method, []))))
    try:
        yield
    finally:
        _reader.reset(token)


def multiply(factor: int) -> None:
    """Multiply the size of training batches by a factor."""
    reader = _reader.get()
    if reader is not None:
        reader.scale = factor


def _with_received_batch(model: Any, name: str, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(batch: Any) -> Any:
        engine = context.engine()
        if engine is not None and name in _shared.get(model, ()):
            batch = same_batches.of_rank_zero(engine, batch)
        return step(batch)

    run.hvdtrain_wrapped = True  # type: ignore[attr-defined]
    return run


def _with_equal_batches(engine: Engine, choose: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(choose)

    def get_data_adapter(*args: Any, **kwargs: Any) -> Any:
        reader = _reader.get()
        if reader is None:
            return choose(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        step = reader.next_step()
        arrays = {name: given.get(name) for name in ("x", "y", "sample_weight")}
        if data_adapters.array_data_adapter.can_convert_arrays(tuple(arrays.values())):
            given.update(same_batches.agreed(engine, arrays))
        elif step is not None and not same_batches.same_everywhere(given["x"]):
            _receive_batches(reader.model, step)
        adapter = choose(**given)
        if step == "train_step" and reader.scale > 1:
            return _with_larger_batches(adapter, reader.scale)
        return adapter

    return get_data_adapter


def _receive_batches(model: Any, step: str) -> None:
    """Let a step first receive the batch of rank 0 from now on; Keras must trace its function again."""
    steps = _shared.setdefault(model, set())
    if step not in steps:
        steps.add(step)
        setattr(model, step.replace("_step", "_function"), None)


def _with_larger_batches(adapter: Any, factor: int) -> Any:
    """Join several batches of the script into one."""
    dataset, count = adapter.get_tf_dataset(), adapter.num_batches
    larger = type(
        "Larger" + type(adapter).__name__,
        (type(adapter),),
        {
            "num_batches": property(lambda self: None if count is None else -(-count // factor)),
            "get_tf_dataset": lambda self: dataset.ragged_batch(factor).map(_concatenated),
        },
    )
    adapter.__class__ = larger
    return adapter


def _concatenated(*batches: Any) -> Any:
    """Concatenate the batches that `ragged_batch` has stacked."""

    def merged(stack: Any) -> Any:
        if isinstance(stack, tf.RaggedTensor):
            return stack.merge_dims(0, 1)
        return tf.reshape(stack, tf.concat([[-1], tf.shape(stack)[2:]], 0))

    joined = tf.nest.map_structure(merged, batches)
    return joined if len(joined) > 1 else joined[0]
