"""Whether a model computes every row of a batch by itself: tried on made-up rows before its work is divided."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src import backend
from tensorflow.python.eager import context

from hvdtrain.collectives.single import SingleEngine
from hvdtrain.wrap import work
from hvdtrain.wrap.share import Share

_ROWS = 5
# Sizes for what a graph leaves open, such as the length of a sequence or the height of an image.
_OPEN = (8, 64)
_ALONE = SingleEngine()
_EXACT, _HALF = 2e-5, 2e-2

Call = Callable[..., Any]


def why_whole(model: keras.Model, call: Call, args: Any, kwargs: Any) -> str:
    """Says why a model needs whole batches, "" where it does not.

    Rows are made up in the shapes and dtypes of the arguments, once all together and once in two parts. Outputs,
    losses and the model's state have to come out the same; afterwards all is as it was before.

    Args:
        model: The model.
        call: Its `__call__`, without any change.
        args: What it is called with.
        kwargs: Likewise.
    """
    error: Exception | None = None
    declared = _declared(model, args)
    with tf.init_scope(), work.trying(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size in _OPEN:
            try:
                whole, parts = _tried(
                    model, call, keras.tree.map_structure(_Maker(size, declared), (args, kwargs))
                )
            except Exception as failed:  # whatever a script's layers do with made-up rows
                error = failed
            else:
                tolerance = _HALF if _computes_in_half(model) else _EXACT
                return "" if whole.made_of(parts, tolerance) else "looks at several rows of a batch at once"
    return f"cannot be tried on {_ROWS} made-up rows ({type(error).__name__})"


def _declared(model: keras.Model, args: Any) -> dict[int, Sequence[int | None]]:
    """Finds what a model that was built from `keras.Input` says of shapes that its arguments leave open."""
    leaves, inputs = keras.tree.flatten(args[:1]), getattr(model, "inputs", None) or []
    if len(leaves) != len(inputs):
        return {}
    return {
        id(leaf): tuple(each.shape)
        for leaf, each in zip(leaves, inputs, strict=True)
        if tf.is_tensor(leaf) and leaf.shape.rank == len(each.shape)
    }


class _Maker:
    """Makes rows like an argument's.

    Args:
        size: How long it is where neither the argument's shape nor the model says anything.
        declared: Shapes that the model was built for, by the id of an argument.
    """

    def __init__(self, size: int, declared: Mapping[int, Sequence[int | None]]) -> None:
        self._size, self._declared = size, declared
        self._random = np.random.default_rng(0)

    def __call__(self, leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = tf.convert_to_tensor(leaf)
        if not tf.is_tensor(leaf):
            return leaf
        shape = [
            next((each for each in both if each is not None), self._size)
            for both in zip(leaf.shape, self._declared.get(id(leaf), leaf.shape), strict=True)
        ]
        made = self._numbers([_ROWS, *shape[1:]] if shape else [], leaf.dtype)
        if isinstance(leaf, tf.RaggedTensor):
            return tf.RaggedTensor.from_tensor(made, ragged_rank=leaf.ragged_rank)
        return tf.sparse.from_dense(made) if isinstance(leaf, tf.SparseTensor) else made

    def _numbers(self, shape: list[int], dtype: tf.DType) -> Any:
        if dtype.is_floating or dtype.is_complex:
            return tf.cast(self._random.uniform(size=shape), dtype)
        # 0 and 1 are words of every vocabulary; no row is all padding, and the parts have other means.
        few = self._random.integers(0, 2, shape)
        if few.ndim:
            few.reshape(_ROWS, -1)[:, 0] = [0, 1, 1, 1, 1] if few.ndim == 1 else 1
        return tf.strings.as_string(few) if dtype == tf.string else tf.cast(few, dtype)


@dataclass(frozen=True)
class _Outcome:
    """What came of a call.

    Args:
        outputs: The outputs, flat.
        losses: Those that layers have added, each as these rows' part of the mean over the batch.
        state: What the call may have changed.
        rows: On how many rows the model was called.
    """

    outputs: list[np.ndarray]
    losses: list[float]
    state: list[np.ndarray]
    rows: int

    def made_of(self, parts: Sequence["_Outcome"], tolerance: float) -> bool:
        """Tells whether this is what parts of the rows give: rows in their order."""
        weights = [each.rows / self.rows for each in parts]
        outputs = [_joined(each, weights) for each in zip(*(part.outputs for part in parts), strict=True)]
        losses = [sum(each) for each in zip(*(part.losses for part in parts), strict=True)]
        pairs = [*zip(self.outputs, outputs, strict=True), *zip(self.losses, losses, strict=True)]
        for each in parts:
            pairs += zip(self.state, each.state, strict=True)
        return all(_close(whole, made, tolerance) for whole, made in pairs)


def _tried(model: keras.Model, call: Call, made: Any) -> tuple[_Outcome, list[_Outcome]]:
    if not all(each.built for each in model._flatten_layers()):
        args, kwargs = keras.tree.map_structure(_symbolic, made)
        backend.compute_output_spec(lambda: call(model, *args, **kwargs))
    shares = [Share(_ALONE, _ROWS, start, end - start) for start, end in ((0, 2), (2, _ROWS))]
    return _called(model, call, made, None), [_called(model, call, made, each) for each in shares]


def _called(model: keras.Model, call: Call, made: Any, share: Share | None) -> _Outcome:
    if share is not None:
        made = keras.tree.map_structure(lambda leaf: part(leaf, share), made)
    args, kwargs = made
    with _as_before(model), work.on_rows(share) if share else contextlib.nullcontext():
        outputs = [
            _array(each) for each in keras.tree.flatten(call(model, *args, **kwargs)) if each is not None
        ]
        losses = [float(np.mean(_array(each))) for layer in model._flatten_layers() for each in layer._losses]
        state = [np.array(each.numpy()) for each in _state(model)]
    rows = share.real if share else _ROWS
    if any(each.ndim and len(each) != rows for each in outputs):
        raise ValueError("another number of rows than it was given")
    return _Outcome(outputs, losses, state, rows)


def part(leaf: Any, share: Share) -> Any:
    """Returns a rank's rows of an argument, the argument itself where it has no rows."""
    if not has_rows(leaf):
        return leaf
    mine = share.take(leaf if tf.is_tensor(leaf) else tf.convert_to_tensor(leaf))
    mask = getattr(leaf, "_keras_mask", None)
    if mask is not None:
        mine._keras_mask = share.take(mask)
    return mine


def has_rows(leaf: Any) -> bool:
    """Tells whether an argument of a model is a batch."""
    return (tf.is_tensor(leaf) or isinstance(leaf, np.ndarray)) and leaf.shape != ()


def _symbolic(leaf: Any) -> Any:
    return keras.KerasTensor((None, *leaf.shape[1:]), leaf.dtype.name) if has_rows(leaf) else leaf


def _state(model: keras.Model) -> list[Any]:
    """Lists what a call may change, but for moving averages, which are taken over all ranks' rows."""
    moving = {
        id(each)
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
        for each in layer.non_trainable_variables
    }
    return [each for each in _variables(model) if id(each) not in moving]


def _variables(model: keras.Model) -> list[Any]:
    """Lists all variables, those of metrics that layers keep included."""
    layers = model._flatten_layers()
    kept = [each for layer in layers for metric in layer._metrics for each in metric.variables]
    return list({id(each): each for each in [*model.variables, *kept]}.values())


@contextlib.contextmanager
def _as_before(model: keras.Model) -> Iterator[None]:
    """Undoes what a call does to variables, to added losses, and to the random numbers that come next."""
    layers = model._flatten_layers()
    values, losses = (
        [(each, each.numpy()) for each in _variables(model)],
        [list(each._losses) for each in layers],
    )
    chance = context.context()._rng
    place = chance.getstate() if chance else None
    model._clear_losses()
    try:
        yield
    finally:
        for variable, value in values:
            variable.assign(value)
        for layer, added in zip(layers, losses, strict=True):
            layer._losses[:] = added
        if chance:
            chance.setstate(place)


def _computes_in_half(model: keras.Model) -> bool:
    return any(each.compute_dtype in ("float16", "bfloat16") for each in model._flatten_layers())


def _array(value: Any) -> np.ndarray:
    array = np.asarray(tf.convert_to_tensor(value))
    if array.dtype.kind in "OSUc":
        raise TypeError(f"an output of dtype {array.dtype}")
    return array if array.dtype.kind in "biu" else array.astype("float64")


def _joined(parts: Sequence[np.ndarray], weights: list[float]) -> Any:
    return np.concatenate(parts) if parts[0].ndim else np.dot(weights, parts)


def _close(whole: Any, made: Any, tolerance: float) -> bool:
    largest = np.max(np.abs(whole), initial=0, where=np.isfinite(whole)) if np.size(whole) else 0
    return bool(np.allclose(whole, made, rtol=0, atol=tolerance * max(float(largest), 1e-6), equal_nan=True))
