"""How Keras reads data: all ranks read the same batches, and where that is not certain, rank 0's."""

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

_FIRST_READS = {
    "fit": ["train_step", "test_step"],
    "evaluate": ["test_step"],
    "predict": ["predict_step"],
    "train_on_batch": [],
    "test_on_batch": [],
}

# Of each model the steps that begin with rank 0's batch.
_shared: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


@dataclass
class _Reader:
    """A model that is about to read data.

    Args:
        model: The model.
        steps: Which of its steps reads next; the last one goes on reading.
        scale: By what the batches that are trained on are multiplied.
    """

    model: Any
    steps: list[str]
    scale: int = 1

    def next(self) -> str | None:
        """Names the step that the next data are for, None where no step reads."""
        return self.steps.pop(0) if len(self.steps) > 1 else next(iter(self.steps), None)


_reader: ContextVar[_Reader | None] = ContextVar("the model that reads", default=None)


def install(engine: Engine) -> None:
    """Changes how Keras chooses what reads a kind of data."""
    replace(data_adapters, "get_data_adapter", lambda choose: _choosing(engine, choose))


@contextlib.contextmanager
def of(model: Any, method: str) -> Iterator[None]:
    """Says for which model and method data are read in this time."""
    for name in ("train_step", "test_step", "predict_step"):
        step = getattr(model, name)
        if not hasattr(step, "hvdtrain_wrapped"):
            # In the instance, because scripts override it in their classes.
            vars(model)[name] = _beginning(model, name, step)
    token = _reader.set(_Reader(model, list(_FIRST_READS.get(method, []))))
    try:
        yield
    finally:
        _reader.reset(token)


def multiply(factor: int) -> None:
    """Makes the batches that are trained on larger."""
    reader = _reader.get()
    if reader is not None:
        reader.scale = factor


def _beginning(model: Any, name: str, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(batch: Any) -> Any:
        engine = context.engine()
        if engine is not None and name in _shared.get(model, ()):
            batch = same_batches.of_rank_zero(engine, batch)
        return step(batch)

    run.hvdtrain_wrapped = True  # type: ignore[attr-defined]
    return run


def _choosing(engine: Engine, choose: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(choose)

    def get_data_adapter(*args: Any, **kwargs: Any) -> Any:
        reader = _reader.get()
        if reader is None:
            return choose(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        step = reader.next()
        arrays = {name: given.get(name) for name in ("x", "y", "sample_weight")}
        if data_adapters.array_data_adapter.can_convert_arrays(tuple(arrays.values())):
            given.update(same_batches.agreed(engine, arrays))
        elif step is not None and not same_batches.same_everywhere(given["x"]):
            _share(reader.model, step)
        adapter = choose(**given)
        return _larger(adapter, reader.scale) if step == "train_step" and reader.scale > 1 else adapter

    return get_data_adapter


def _share(model: Any, step: str) -> None:
    """Makes a step begin with rank 0's batch from now on; what was traced before does not."""
    steps = _shared.setdefault(model, set())
    if step not in steps:
        steps.add(step)
        setattr(model, step.replace("_step", "_function"), None)


def _larger(adapter: Any, factor: int) -> Any:
    """Joins batches of the script into larger ones."""
    dataset, count = adapter.get_tf_dataset(), adapter.num_batches
    larger = type(
        "Larger" + type(adapter).__name__,
        (type(adapter),),
        {
            "num_batches": property(lambda self: None if count is None else -(-count // factor)),
            "get_tf_dataset": lambda self: dataset.ragged_batch(factor).map(_end_to_end),
        },
    )
    adapter.__class__ = larger
    return adapter


def _end_to_end(*batches: Any) -> Any:
    """Puts several batches, which `ragged_batch` has stacked, one after the other."""

    def merged(stack: Any) -> Any:
        if isinstance(stack, tf.RaggedTensor):
            return stack.merge_dims(0, 1)
        return tf.reshape(stack, tf.concat([[-1], tf.shape(stack)[2:]], 0))

    joined = tf.nest.map_structure(merged, batches)
    return joined if len(joined) > 1 else joined[0]
