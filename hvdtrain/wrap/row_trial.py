"""Test on generated rows whether a model computes each row of a batch independently of the others."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src import backend

from hvdtrain.collectives.single import SingleEngine
from hvdtrain.wrap import randomness
from hvdtrain.wrap.layers import OUTPUT, Kind, kind_of
from hvdtrain.wrap.row_shard import Share, alone, has_rows, part, running

_ROWS = 5
_PARTS = (2, 3)
# Sizes to try for unknown dimensions, such as the length of a sequence or the height of an image.
_UNKNOWN_SIZES = (8, 64)
_SINGLE_ENGINE = SingleEngine()
# Relative tolerances for models that compute in float32 or float64, and in 16 bits.
_EXACT, _HALF = 2e-5, 2e-2
# Factor for losses: a loss adds many numbers, some of which may cancel.
_LOSS_FACTOR = 5
# Distributions of the numbers. A loss such as `abs(mean(x))` looks like a mean over rows while all numbers have the
# same sign, and `relu(x - 3)` is 0 below 3. So each loss is computed for several kinds of rows.
_DISTRIBUTIONS = ("uniform", "normal", "of two signs", "wide")

Call = Callable[..., Any]
# Shapes that a model built from `keras.Input` declares, by the id of an argument.
Shapes = Mapping[int, Sequence[int | None]]


@dataclass(frozen=True)
class Verdict:
    """The result of the test of a model.

    Args:
        why_whole: Why the model needs whole batches; "" if it does not.
        losses: Pairs of a layer name and a kind of loss, in the order in which a call adds the losses.
    """

    why_whole: str
    losses: Sequence[tuple[str, Kind]] = ()


def verdict(model: keras.Model, call: Call, args: Any, kwargs: Any) -> Verdict:
    """Return whether a model needs whole batches, and how the losses of its parts combine.

    Rows are generated with the shapes and dtypes of the arguments. The model computes all rows at once, and then
    two parts of them. Outputs, losses and the state of the model must be equal. Afterwards the state is restored.

    Args:
        model: The model.
        call: Its original `__call__`.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
    """
    error: Exception | None = None
    shapes = _declared_shapes(model, args)
    with tf.init_scope(), alone(testing=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size in _UNKNOWN_SIZES:
            try:
                return _judged(model, call, (args, kwargs), size, shapes)
            except Exception as caught:  # the layers of a script may raise anything for generated rows
                error = caught
    return Verdict(f"cannot be tested on {_ROWS} generated rows ({type(error).__name__})")


@dataclass(frozen=True)
class _Outcome:
    """The result of a call of a model."""

    outputs: list[np.ndarray]
    losses: list[tuple[str, np.ndarray]]  # of each layer that has added one; also outputs without rows
    state: list[np.ndarray]  # values of the variables that the call may change

    def loss_names(self) -> list[str]:
        return [name for name, _ in self.losses]

    def equals_joined(self, parts: Sequence["_Outcome"], tolerance: float) -> bool:
        """Return whether the joined outputs of the parts, and the state of each, equal this outcome."""
        pairs = []
        for expected, *found in zip(self.outputs, *(outcome.outputs for outcome in parts), strict=True):
            pairs.append((expected, np.concatenate(found)))
        for outcome in parts:
            pairs += zip(self.state, outcome.state, strict=True)
        return all(_close(expected, found, tolerance) for expected, found in pairs)


def _judged(model: keras.Model, call: Call, arguments: Any, size: int, shapes: Shapes) -> Verdict:
    tolerance = _EXACT
    if any(layer.compute_dtype in ("float16", "bfloat16") for layer in model._flatten_layers()):
        tolerance = _HALF

    def outcomes_of(distribution: str) -> list[_Outcome]:
        maker = _RowMaker(size, shapes, distribution)
        return _whole_and_parts(model, call, keras.tree.map_structure(maker, arguments))

    whole, *parts = outcomes_of(_DISTRIBUTIONS[0])
    if not whole.equals_joined(parts, tolerance):
        return Verdict("looks at several rows of a batch at once")
    if not whole.losses:
        return Verdict("")
    outcomes = [[whole, *parts], *(outcomes_of(distribution) for distribution in _DISTRIBUTIONS[1:])]
    names = whole.loss_names()
    if any(outcome.loss_names() != names for of_rows in outcomes for outcome in of_rows):
        return Verdict("adds losses that depend on its numbers")
    losses = []
    for index, name in enumerate(names):
        observations = []
        for of_rows in outcomes:
            observations.append([outcome.losses[index][1] for outcome in of_rows])
        kind = kind_of(observations, _PARTS, _LOSS_FACTOR * tolerance)
        if kind is None:
            return Verdict(f"has a loss that is neither a mean nor a sum over rows ({name})")
        losses.append((name, kind))
    return Verdict("", losses)


def _declared_shapes(model: keras.Model, args: Any) -> Shapes:
    leaves, inputs = keras.tree.flatten(args[:1]), getattr(model, "inputs", None) or []
    if len(leaves) != len(inputs):
        return {}
    shapes: dict[int, Sequence[int | None]] = {}
    for leaf, declared in zip(leaves, inputs, strict=True):
        if tf.is_tensor(leaf) and leaf.shape.rank == len(declared.shape):
            shapes[id(leaf)] = tuple(declared.shape)
    return shapes


class _RowMaker:
    """A function that generates rows like those of an argument, with `size` for each unknown dimension."""

    def __init__(self, size: int, shapes: Shapes, distribution: str) -> None:
        self._size, self._shapes, self._distribution = size, shapes, distribution
        self._random = np.random.default_rng(_DISTRIBUTIONS.index(distribution))

    def __call__(self, leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = tf.convert_to_tensor(leaf)
        if not tf.is_tensor(leaf):
            return leaf
        rows = self._numbers(self._shape(leaf), leaf.dtype)
        mask = getattr(leaf, "_keras_mask", None)
        if mask is not None:
            rows._keras_mask = self._numbers(rows.shape[: len(mask.shape)], tf.bool)
        if isinstance(leaf, tf.RaggedTensor):
            return tf.RaggedTensor.from_tensor(rows, ragged_rank=leaf.ragged_rank)
        return tf.sparse.from_dense(rows) if isinstance(leaf, tf.SparseTensor) else rows

    def _shape(self, leaf: Any) -> list[int]:
        shape = []
        for size, declared in zip(leaf.shape, self._shapes.get(id(leaf), leaf.shape), strict=True):
            known = declared if size is None else size
            shape.append(self._size if known is None else known)
        return [_ROWS, *shape[1:]] if shape else []

    def _numbers(self, shape: list[int], dtype: tf.DType) -> Any:
        if dtype.is_floating or dtype.is_complex:
            return tf.cast(self._floats(shape), dtype)
        # 0 and 1 are valid indices of every vocabulary. No row may be all padding, and the two parts need different
        # means: otherwise a layer that looks at several rows could pass the test.
        integers = self._random.integers(0, 2, shape)
        if integers.ndim:
            integers.reshape(_ROWS, -1)[:, 0] = [0, 1, 1, 1, 1] if integers.ndim == 1 else 1
        return tf.strings.as_string(integers) if dtype == tf.string else tf.cast(integers, dtype)

    def _floats(self, shape: list[int]) -> Any:
        if self._distribution == "normal":
            return self._random.normal(size=shape)
        if self._distribution == "wide":
            return self._random.normal(size=shape, scale=10)
        numbers = self._random.uniform(size=shape)
        if self._distribution == "of two signs" and numbers.ndim:
            numbers[: _PARTS[0]] *= -1
        return numbers


def _whole_and_parts(model: keras.Model, call: Call, arguments: Any) -> list[_Outcome]:
    """Return the outcomes of all rows, and of each of the two parts."""
    if not all(layer.built for layer in model._flatten_layers()):
        args, kwargs = keras.tree.map_structure(_symbolic, arguments)
        backend.compute_output_spec(lambda: call(model, *args, **kwargs))
    generators = randomness.generators()
    outcomes = [_called(model, call, arguments, generators, None)]
    for start, rows in ((0, _PARTS[0]), (_PARTS[0], _PARTS[1])):
        share = Share(_SINGLE_ENGINE, _ROWS, start, rows)
        outcomes.append(_called(model, call, arguments, generators, share))
    return outcomes


def _called(
    model: keras.Model, call: Call, arguments: Any, generators: Sequence[Any], share: Share | None
) -> _Outcome:
    rows = _ROWS
    if share is not None:
        rows = share.real
        arguments = keras.tree.map_structure(lambda leaf: part(leaf, share), arguments)
    args, kwargs = arguments
    losses: list[tuple[str, Any]] = []
    outputs: list[np.ndarray] = []
    state: list[np.ndarray] = []

    def record(name: str, loss: Any) -> Any:
        losses.append((name, loss))
        return loss

    with _restored(model, generators), running(share=share, combine=record):
        for leaf in keras.tree.flatten(call(model, *args, **kwargs)):
            if tf.is_tensor(leaf):
                attributes = [getattr(leaf, name, None) for name in ("_keras_mask", "_keras_logits")]
                outputs += [_array(tensor) for tensor in (leaf, *attributes) if tensor is not None]
            elif leaf is not None:
                state.append(_array(leaf))
        losses = [(name, _array(loss)) for name, loss in losses]
        state += [np.array(variable.numpy()) for variable in _state(model)]
    losses += [(OUTPUT, output) for output in outputs if not output.ndim]
    outputs = [output for output in outputs if output.ndim]
    if any(len(output) != rows for output in outputs):
        raise ValueError("the model returned another number of rows than it received")
    return _Outcome(outputs, losses, state)


def _symbolic(leaf: Any) -> Any:
    return keras.KerasTensor((None, *leaf.shape[1:]), leaf.dtype.name) if has_rows(leaf) else leaf


def _state(model: keras.Model) -> list[Any]:
    """List the variables that a call may change, without moving averages, which use the rows of all ranks."""
    moving_averages: set[int] = set()
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            moving_averages.update(id(variable) for variable in layer.non_trainable_variables)
    return [variable for variable in _variables(model) if id(variable) not in moving_averages]


def _variables(model: keras.Model) -> list[Any]:
    """List all variables, also those of the metrics of layers, each once."""
    variables = list(model.variables)
    for layer in model._flatten_layers():
        for metric in layer._metrics:
            variables += metric.variables
    return list({id(variable): variable for variable in variables}.values())


@contextlib.contextmanager
def _restored(model: keras.Model, generators: Sequence[Any]) -> Iterator[None]:
    """Restore variables, added losses and random number generators at the end of this context."""
    layers = model._flatten_layers()
    values = [(variable, variable.numpy()) for variable in _variables(model)]
    losses = [list(layer._losses) for layer in layers]
    model._clear_losses()
    try:
        with randomness.unchanged(generators):
            yield
    finally:
        for variable, value in values:
            variable.assign(value)
        for layer, added in zip(layers, losses, strict=True):
            layer._losses[:] = added


def _array(value: Any) -> np.ndarray:
    array = np.asarray(tf.convert_to_tensor(value))
    if array.dtype.kind in "OSUc":
        raise TypeError(f"The model returned an output of dtype {array.dtype}, which cannot be compared.")
    return array if array.dtype.kind in "biu" else array.astype("float64")


def _close(expected: Any, found: Any, tolerance: float) -> bool:
    largest = np.max(np.abs(expected), initial=0, where=np.isfinite(expected)) if np.size(expected) else 0
    atol = tolerance * max(float(largest), 1e-6)
    return bool(np.allclose(expected, found, rtol=0, atol=atol, equal_nan=True))
