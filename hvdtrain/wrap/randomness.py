"""Chance that is the same on all ranks, and drawn for the whole batch where a rank computes some of its rows."""

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
from hvdtrain.wrap import context
from hvdtrain.wrap.row_shard import Share

# Draws whose numbers belong to rows; the first argument is a shape.
_OF_SHAPES = ("normal", "uniform", "randint", "truncated_normal")
# Draws that also take tensors of the rank's rows; there the ranks' seeds are kept apart instead.
_OF_ROWS = ("categorical", "gamma", "binomial", "beta", "shuffle")
_GENERATORS = (
    random.Random,
    np.random.RandomState,
    np.random.Generator,
    tf.random.Generator,
    keras.random.SeedGenerator,
)


def install(engine: Engine) -> None:
    """Let all ranks draw the same random numbers: those of one process, wherever the script sets a seed."""
    align(engine)  # the script may have set seeds before it imported Keras
    seeds = random.Random(engine.broadcast_object(random.SystemRandom().randrange(2**31)))
    _seed_what_asks_the_system(seeds)
    for module, names in ((keras_random, _OF_SHAPES), (tf.random, ("normal", "uniform", "truncated_normal"))):
        for name in names:
            replace(module, name, _for_the_batch)
    replace(keras_random, "dropout", _dropout_of_the_batch)
    for name in _OF_ROWS:
        replace(keras_random, name, _apart)


def align(engine: Engine) -> None:
    """Gives all ranks rank 0's place in Python's and NumPy's random numbers: threads may have drawn from them."""
    ours, numpys = engine.broadcast_object((random.getstate(), np.random.get_state()))
    random.setstate(ours)
    np.random.set_state(numpys)


def generators() -> list[Any]:
    """Find every generator of random numbers that a layer, a module or a function holds. It takes 0.2 s."""
    return [found for found in gc.get_objects() if issubclass(type(found), _GENERATORS)]


@contextlib.contextmanager
def unchanged(generators: Sequence[Any]) -> Iterator[None]:
    """Leave generators of random numbers, and the one that Keras may make for itself, where they are.

    Args:
        generators: What `generators` has found.
    """
    keras_had_one = get_global_attribute(GLOBAL_SEED_GENERATOR) is not None
    restore = [_restorer(generator) for generator in generators]
    with _fresh_kernels():
        try:
            yield
        finally:
            for put_back in restore:
                put_back()
            if not keras_had_one:
                set_global_attribute(GLOBAL_SEED_GENERATOR, None)


def _restorer(generator: Any) -> Callable[[], Any]:
    """Return what puts a generator back to where it is now."""
    if isinstance(generator, np.random.Generator):
        bits, place = generator.bit_generator, generator.bit_generator.state
        return lambda: setattr(bits, "state", place)
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
    """Run TensorFlow's stateful draws in kernels of their own.

    TensorFlow keeps the kernel of an eager operation for the next call with the same seeds, which goes on with the
    numbers where the last one stopped.
    """
    kept = {name: function for name, function in vars(gen_random_ops).items() if _draws(name, function)}
    for name, function in kept.items():
        setattr(gen_random_ops, name, _in_a_graph_of_its_own(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(gen_random_ops, name, function)


def _draws(name: str, function: Any) -> bool:
    if not inspect.isfunction(function) or name.endswith("_fallback"):
        return False
    return name.islower() and "seed2" in inspect.signature(function).parameters


def _in_a_graph_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    def draw(*args: Any, **kwargs: Any) -> Any:
        if not tf.executing_eagerly():
            return function(*args, **kwargs)
        return tf.function(lambda: function(*args, **kwargs)).get_concrete_function()()

    return draw


def _seed_what_asks_the_system(seeds: random.Random) -> None:
    """Make all that has no seed draw alike on all ranks.

    What has one keeps it: the numbers are those of one process, and the same at the next start.
    """

    def seeded(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda seed=None: original(seeds.randrange(2**32) if seed is None else seed)

    def operation_seeds(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_seed(op_seed: Any) -> tuple[Any, Any]:
            found = original(op_seed)
            return (seeds.randrange(1, 2**31), seeds.randrange(2**31)) if found == (None, None) else found

        return get_seed

    replace(np.random, "default_rng", seeded)
    replace(random_seed, "get_seed", operation_seeds)
    generator = tf.random.Generator.from_seed
    tf.random.Generator.from_non_deterministic_state = lambda alg=None: generator(seeds.randrange(2**32), alg)


def _for_the_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Draws for all rows, of which a rank takes its own: the same numbers as on one process."""

    def draw(shape: Any, *args: Any, **kwargs: Any) -> Any:
        share = context.share()
        if share is None or _rank_of(shape) == 0:
            return original(shape, *args, **kwargs)
        first, rest = _split(shape)
        times, whole = _times(first, share)
        drawn = original(tf.concat([[whole], rest], 0), *args, **kwargs)
        begin = tf.where(times > 0, share.start * times, 0)
        mine = drawn[begin : begin + first]
        mine.set_shape(_static(shape))
        return mine

    return draw


def _dropout_of_the_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def dropout(inputs: Any, rate: float, noise_shape: Any = None, seed: Any = None) -> Any:
        share = context.share()
        if share is None or not 0 < rate < 1 or inputs.shape.rank in (0, None):
            return original(inputs, rate, noise_shape, seed)
        shape = tf.shape(inputs)
        times, whole = _times(shape[0], share)
        ones = tf.ones(tf.concat([[whole], shape[1:]], 0), inputs.dtype)
        if noise_shape is not None and (tf.is_tensor(noise_shape[0]) or noise_shape[0] not in (1, None)):
            noise_shape = (None, *noise_shape[1:])
        factor = original(ones, rate, noise_shape, seed)
        begin = tf.where(times > 0, share.start * times, 0)
        return inputs * tf.ensure_shape(factor[begin : begin + shape[0]], inputs.shape)

    return dropout


def _times(first: Any, share: Share) -> tuple[Any, Any]:
    """Returns how many rows belong to a row of the batch, and how many all of these are.

    Where `first` is no multiple of the rank's rows the first is 0: these numbers belong to no row.
    """
    rows, count = (tf.cast(each, tf.int32) for each in (share.rows, share.count))
    times = tf.where(first % rows == 0, first // rows, 0)
    return times, tf.where(times > 0, tf.maximum(count * times, first), first)


def _split(shape: Any) -> tuple[Any, Any]:
    sizes = tf.convert_to_tensor(shape, tf.int32) if not tf.is_tensor(shape) else tf.cast(shape, tf.int32)
    return sizes[0], sizes[1:]


def _rank_of(shape: Any) -> int | None:
    return shape.shape[0] if tf.is_tensor(shape) else len(shape)


def _static(shape: Any) -> Any:
    if tf.is_tensor(shape):
        known = tf.get_static_value(shape, partial=True)
        return (
            [None] * shape.shape[0]
            if known is None
            else [None if each is None else int(each) for each in known]
        )
    return [None if tf.is_tensor(each) else each for each in shape]


def _apart(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the rank to the seed, so that no two ranks draw alike for different rows."""

    def draw(*args: Any, **kwargs: Any) -> Any:
        share, plain = context.share(), keras_random._cast_seed
        if share is None:
            return original(*args, **kwargs)
        keras_random._cast_seed = lambda seed: plain(seed) + share.engine.rank
        try:
            return original(*args, **kwargs)
        finally:
            keras_random._cast_seed = plain

    return draw
