"""Draw the same random numbers on all ranks, and draw them for the whole batch where a rank computes some rows."""

import contextlib
import functools
import gc
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute
from keras.src.backend.tensorflow import random as keras_random
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR
from tensorflow.python.framework import random_seed
from tensorflow.python.ops import gen_random_ops

from hvdtrain.collectives.engine import Engine
from hvdtrain.patching import replace
from hvdtrain.wrap.row_shard import Share, current

# Functions whose numbers belong to rows. The first argument is a shape.
_OF_SHAPES = ("normal", "uniform", "randint", "truncated_normal")
# Functions that also take tensors with the rows of this rank. Each rank uses another seed for them.
_OF_ROWS = ("categorical", "gamma", "binomial", "beta", "shuffle")
_GENERATORS = (
    random.Random,
    np.random.RandomState,
    np.random.Generator,
    tf.random.Generator,
    keras.random.SeedGenerator,
)


def install(engine: Engine) -> None:
    """Let all ranks draw the same random numbers. Where the script sets a seed, they are those of one process."""
    align(engine)  # the script may have set seeds before it imported Keras
    seeds = random.Random(engine.broadcast_object(random.SystemRandom().randrange(2**31)))
    _seed_unseeded_generators(seeds)
    for module, names in ((keras_random, _OF_SHAPES), (tf.random, ("normal", "uniform", "truncated_normal"))):
        for name in names:
            replace(module, name, _for_whole_batch)
    replace(keras_random, "dropout", _dropout_for_whole_batch)
    for name in _OF_ROWS:
        replace(keras_random, name, _with_rank_in_seed)


def align(engine: Engine) -> None:
    """Copy the states of the generators of Python and NumPy from rank 0: threads may have drawn from them."""
    # Not with keras/checkpointing/random_numbers.py: to read TensorFlow's generator starts TensorFlow, which the
    # script may still have to configure.
    python_state, numpy_state = engine.broadcast_object((random.getstate(), np.random.get_state()))
    random.setstate(python_state)
    np.random.set_state(numpy_state)


def generators() -> list[Any]:
    """Return all random number generators of layers, modules and functions. This takes 0.2 s."""
    return [value for value in gc.get_objects() if issubclass(type(value), _GENERATORS)]


@contextlib.contextmanager
def unchanged(generators: Sequence[Any]) -> Iterator[None]:
    """Restore random number generators, also the global one of Keras, at the end of this context."""
    keras_had_generator = get_global_attribute(GLOBAL_SEED_GENERATOR) is not None
    restorers = [_restorer(generator) for generator in generators]
    with _fresh_kernels():
        try:
            yield
        finally:
            for restore in restorers:
                restore()
            if not keras_had_generator:
                set_global_attribute(GLOBAL_SEED_GENERATOR, None)


def _restorer(generator: Any) -> Callable[[], Any]:
    """Return a function that restores the present state of a generator."""
    if isinstance(generator, np.random.Generator):
        bits, state = generator.bit_generator, generator.bit_generator.state
        return lambda: setattr(bits, "state", state)
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.SystemRandom):
        return lambda: None
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    variable = generator.state
    return functools.partial(variable.assign, np.array(variable.numpy()))


@contextlib.contextmanager
def _fresh_kernels() -> Iterator[None]:
    """Run the stateful random operations of TensorFlow in new kernels.

    TensorFlow keeps the kernel of an eager operation for the next call with the same seeds, which continues the
    sequence of numbers of the last call.
    """
    kept = {name: function for name, function in vars(gen_random_ops).items() if _is_random(name, function)}
    for name, function in kept.items():
        setattr(gen_random_ops, name, _in_new_graph(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(gen_random_ops, name, function)


def _is_random(name: str, function: Any) -> bool:
    if not inspect.isfunction(function) or name.endswith("_fallback"):
        return False
    return name.islower() and "seed2" in inspect.signature(function).parameters


def _in_new_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    def draw(*args: Any, **kwargs: Any) -> Any:
        if not tf.executing_eagerly():
            return function(*args, **kwargs)
        return tf.function(lambda: function(*args, **kwargs)).get_concrete_function()()

    return draw


def _seed_unseeded_generators(seeds: random.Random) -> None:
    """Make generators without a seed draw the same numbers on all ranks.

    A generator with a seed keeps it. Its numbers are those of one process, and the same in the next run.
    """

    def seeded(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda seed=None: original(seeds.randrange(2**32) if seed is None else seed)

    def operation_seeds(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_seed(op_seed: Any) -> tuple[Any, Any]:
            found = original(op_seed)
            if found == (None, None):
                return seeds.randrange(1, 2**31), seeds.randrange(2**31)
            return found

        return get_seed

    replace(np.random, "default_rng", seeded)
    replace(random_seed, "get_seed", operation_seeds)
    generator = tf.random.Generator.from_seed
    tf.random.Generator.from_non_deterministic_state = lambda alg=None: generator(seeds.randrange(2**32), alg)


def _for_whole_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Draw numbers for all rows and keep those of this rank: the same numbers as on one process."""

    def draw(shape: Any, *args: Any, **kwargs: Any) -> Any:
        share = current().share
        if share is None:
            return original(shape, *args, **kwargs)
        sizes = tf.cast(shape, tf.int32)
        if sizes.shape[0] == 0:
            return original(shape, *args, **kwargs)
        whole, begin = _whole_and_begin(sizes[0], share)
        drawn = original(tf.concat([[whole], sizes[1:]], 0), *args, **kwargs)
        mine = drawn[begin : begin + sizes[0]]
        mine.set_shape(_static(shape))
        return mine

    return draw


def _dropout_for_whole_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def dropout(inputs: Any, rate: float, noise_shape: Any = None, seed: Any = None) -> Any:
        share = current().share
        if share is None or not 0 < rate < 1 or inputs.shape.rank in (0, None):
            return original(inputs, rate, noise_shape, seed)
        shape = tf.shape(inputs)
        whole, begin = _whole_and_begin(shape[0], share)
        ones = tf.ones(tf.concat([[whole], shape[1:]], 0), inputs.dtype)
        if noise_shape is not None and (tf.is_tensor(noise_shape[0]) or noise_shape[0] not in (1, None)):
            noise_shape = (None, *noise_shape[1:])
        factor = original(ones, rate, noise_shape, seed)
        return inputs * tf.ensure_shape(factor[begin : begin + shape[0]], inputs.shape)

    return dropout


def _whole_and_begin(first: Any, share: Share) -> tuple[Any, Any]:
    """Return how many rows to draw for the whole batch, and the first of them that belongs to this rank.

    If the first dimension of the shape to draw is not a multiple of this rank's rows, the numbers belong to no row.
    """
    rows, count = tf.cast(share.rows, tf.int32), tf.cast(share.count, tf.int32)
    per_row = tf.where(first % rows == 0, first // rows, 0)
    whole = tf.where(per_row > 0, tf.maximum(count * per_row, first), first)
    return whole, tf.where(per_row > 0, share.start * per_row, 0)


def _static(shape: Any) -> Any:
    if not tf.is_tensor(shape):
        return [None if tf.is_tensor(size) else size for size in shape]
    known = tf.get_static_value(shape, partial=True)
    if known is None:
        return [None] * shape.shape[0]
    return [None if size is None else int(size) for size in known]


def _with_rank_in_seed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add the rank to the seed, so that different rows on two ranks get different numbers."""

    def draw(*args: Any, **kwargs: Any) -> Any:
        share, plain = current().share, keras_random._cast_seed
        if share is None:
            return original(*args, **kwargs)
        keras_random._cast_seed = lambda seed: plain(seed) + share.engine.rank
        try:
            return original(*args, **kwargs)
        finally:
            keras_random._cast_seed = plain

    return draw
