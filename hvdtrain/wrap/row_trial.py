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

from hvdtrain.collectives.single import SingleEngine
from hvdtrain.wrap import context, randomness
from hvdtrain.wrap.layer_losses import OUTPUT, Kind, Observation, Recorded, kind_of
from hvdtrain.wrap.row_shard import Share
from hvdtrain.wrap.tensor_attributes import kept_on, moved

_ROWS = 5
_PARTS = (2, 3)
# Sizes for what a graph leaves open, such as the length of a sequence or the height of an image.
_OPEN = (8, 64)
_ALONE = SingleEngine()
_EXACT, _HALF = 2e-5, 2e-2
# A loss adds up many numbers, some of which may cancel.
_LOOSER = 5
# How numbers are drawn. A loss such as `abs(mean(x))` looks like a mean over rows while all numbers have the same
# sign, and `relu(x - 3)` is 0 below 3. So each loss is seen for several kinds of rows.
_DRAWS = ("uniform", "normal", "of two signs", "wide")

Call = Callable[..., Any]


@dataclass(frozen=True)
class Verdict:
    """What was found out about a model.

    Args:
        why_whole: Why it needs whole batches, "" where it does not.
        losses: The name of the layer, and the kind of loss, in the order in which a call adds them.
    """

    why_whole: str
    losses: Sequence[tuple[str, Kind]] = ()


def verdict(model: keras.Model, call: Call, args: Any, kwargs: Any) -> Verdict:
    """Find out whether a model needs whole batches, and how the losses of its parts combine.

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
    with tf.init_scope(), context.trying(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size in _OPEN:
            try:
                return _judged(model, call, args, kwargs, _Maker(size, declared))
            except Exception as failed:  # whatever a script's layers do with made-up rows
                error = failed
    return Verdict(f"cannot be tried on {_ROWS} made-up rows ({type(error).__name__})")


def _judged(model: keras.Model, call: Call, args: Any, kwargs: Any, maker: "_Maker") -> Verdict:
    tolerance = _HALF if _computes_in_half(model) else _EXACT

    def tried(draw: str) -> tuple[_Outcome, list[_Outcome]]:
        maker.begin(draw)
        return _tried(model, call, keras.tree.map_structure(maker, (args, kwargs)))

    outcomes = [tried(_DRAWS[0])]
    if not outcomes[0][0].made_of(outcomes[0][1], tolerance):
        return Verdict("looks at several rows of a batch at once")
    if not outcomes[0][0].losses:
        return Verdict("")
    outcomes += [tried(draw) for draw in _DRAWS[1:]]
    names = [name for name, _ in outcomes[0][0].losses]
    if any(
        [name for name, _ in each.losses] != names for whole, parts in outcomes for each in (whole, *parts)
    ):
        return Verdict("adds losses that depend on its numbers")
    kinds = [kind_of(_observed(outcomes, index), _LOOSER * tolerance) for index in range(len(names))]
    unclear = [name for name, kind in zip(names, kinds, strict=True) if kind is None]
    if unclear:
        return Verdict(f"has a loss that is neither a mean nor a sum over rows ({unclear[0]})")
    return Verdict("", [(name, kind) for name, kind in zip(names, kinds, strict=True) if kind is not None])


def _observed(outcomes: "Sequence[tuple[_Outcome, list[_Outcome]]]", index: int) -> list[Observation]:
    return [
        Observation(
            whole.losses[index][1], [part.losses[index][1] for part in parts], [part.rows for part in parts]
        )
        for whole, parts in outcomes
    ]


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
        self.begin(_DRAWS[0])

    def begin(self, draw: str) -> None:
        """Draw all numbers in one way from now on.

        Args:
            draw: One of `_DRAWS`.
        """
        self._draw = draw
        self._random = np.random.default_rng(_DRAWS.index(draw))

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
        mask = getattr(leaf, "_keras_mask", None)
        if mask is not None:
            made._keras_mask = self._numbers(made.shape[: len(mask.shape)], tf.bool)
        if isinstance(leaf, tf.RaggedTensor):
            return tf.RaggedTensor.from_tensor(made, ragged_rank=leaf.ragged_rank)
        return tf.sparse.from_dense(made) if isinstance(leaf, tf.SparseTensor) else made

    def _floats(self, shape: list[int]) -> Any:
        if self._draw == "normal":
            return self._random.normal(size=shape)
        if self._draw == "wide":
            return self._random.normal(size=shape, scale=10)
        made = self._random.uniform(size=shape)
        if self._draw == "of two signs" and made.ndim:
            made[: _PARTS[0]] *= -1
        return made

    def _numbers(self, shape: list[int], dtype: tf.DType) -> Any:
        if dtype.is_floating or dtype.is_complex:
            return tf.cast(self._floats(shape), dtype)
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
        losses: The name of the layer, and the loss it has added; likewise outputs without rows.
        state: What the call may have changed.
        rows: On how many rows the model was called.
    """

    outputs: list[np.ndarray]
    losses: list[tuple[str, np.ndarray]]
    state: list[np.ndarray]
    rows: int

    def made_of(self, parts: Sequence["_Outcome"], tolerance: float) -> bool:
        """Tell whether outputs and state are what parts of the rows give: rows in their order."""
        outputs = [np.concatenate(each) for each in zip(*(part.outputs for part in parts), strict=True)]
        pairs = [*zip(self.outputs, outputs, strict=True)]
        for each in parts:
            pairs += zip(self.state, each.state, strict=True)
        return all(_close(whole, made, tolerance) for whole, made in pairs)


def _tried(model: keras.Model, call: Call, made: Any) -> tuple[_Outcome, list[_Outcome]]:
    if not all(each.built for each in model._flatten_layers()):
        args, kwargs = keras.tree.map_structure(_symbolic, made)
        backend.compute_output_spec(lambda: call(model, *args, **kwargs))
    shares = [Share(_ALONE, _ROWS, start, end - start) for start, end in ((0, _PARTS[0]), (_PARTS[0], _ROWS))]
    generators = randomness.generators()
    whole, *parts = [_called(model, call, made, share, generators) for share in (None, *shares)]
    return whole, parts


def _called(
    model: keras.Model, call: Call, made: Any, share: Share | None, generators: Sequence[Any]
) -> _Outcome:
    if share is not None:
        made = keras.tree.map_structure(lambda leaf: part(leaf, share), made)
    args, kwargs = made
    recorded = Recorded()
    rows = context.on_rows(share) if share else contextlib.nullcontext()
    with _as_before(model, generators), rows, context.adding(recorded):
        leaves = [each for each in keras.tree.flatten(call(model, *args, **kwargs)) if each is not None]
        tensors = [each for leaf in leaves if tf.is_tensor(leaf) for each in (leaf, *kept_on(leaf))]
        outputs = [_array(each) for each in tensors]
        losses = [(name, _array(loss)) for name, loss in recorded.found]
        state = [np.array(each.numpy()) for each in _state(model)]
        state += [_array(leaf) for leaf in leaves if not tf.is_tensor(leaf)]
    losses += [(OUTPUT, each) for each in outputs if not each.ndim]
    outputs = [each for each in outputs if each.ndim]
    real = share.real if share else _ROWS
    if any(len(each) != real for each in outputs):
        raise ValueError("another number of rows than it was given")
    return _Outcome(outputs, losses, state, real)


def part(leaf: Any, share: Share) -> Any:
    """Returns a rank's rows of an argument, the argument itself where it has no rows."""
    if not has_rows(leaf):
        return leaf
    return moved(leaf if tf.is_tensor(leaf) else tf.convert_to_tensor(leaf), share.take)


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
def _as_before(model: keras.Model, generators: Sequence[Any]) -> Iterator[None]:
    """Undoes what a call does to variables, to added losses, and to the random numbers that come next."""
    layers = model._flatten_layers()
    values, losses = (
        [(each, each.numpy()) for each in _variables(model)],
        [list(each._losses) for each in layers],
    )
    model._clear_losses()
    try:
        with randomness.unchanged(generators):
            yield
    finally:
        for variable, value in values:
            variable.assign(value)
        for layer, added in zip(layers, losses, strict=True):
            layer._losses[:] = added


def _computes_in_half(model: keras.Model) -> bool:
    return any(each.compute_dtype in ("float16", "bfloat16") for each in model._flatten_layers())


def _array(value: Any) -> np.ndarray:
    array = np.asarray(tf.convert_to_tensor(value))
    if array.dtype.kind in "OSUc":
        raise TypeError(f"an output of dtype {array.dtype}")
    return array if array.dtype.kind in "biu" else array.astype("float64")


def _close(whole: Any, made: Any, tolerance: float) -> bool:
    largest = np.max(np.abs(whole), initial=0, where=np.isfinite(whole)) if np.size(whole) else 0
    return bool(np.allclose(whole, made, rtol=0, atol=tolerance * max(float(largest), 1e-6), equal_nan=True))
