"""Chance that is the same on all ranks, and drawn for the whole batch where a rank computes some of its rows."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow import random as keras_random

from hvdtrain.collectives.base import Engine
from hvdtrain.replacing import replace
from hvdtrain.wrap import work
from hvdtrain.wrap.share import Share

# Draws whose numbers belong to rows; the first argument is a shape.
_OF_SHAPES = ("normal", "uniform", "randint", "truncated_normal")
# Draws that also take tensors of the rank's rows; there the ranks' seeds are kept apart instead.
_OF_ROWS = ("categorical", "gamma", "binomial", "beta", "shuffle")


def install(engine: Engine) -> None:
    """Seeds every generator alike on all ranks, as `keras.utils.set_random_seed` would, with a number by chance."""
    entropy = engine.broadcast_object(random.SystemRandom().randrange(2**31))
    random.seed(entropy)
    np.random.seed(entropy)
    tf.random.set_seed(entropy)
    _seed_what_asks_the_system(entropy)
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


def _seed_what_asks_the_system(entropy: int) -> None:
    """Makes `default_rng()` and `RandomState()` without a seed draw alike on all ranks."""
    seeds = random.Random(entropy)

    def seeded(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda seed=None: original(seeds.randrange(2**32) if seed is None else seed)

    replace(np.random, "default_rng", seeded)
    generator = tf.random.Generator.from_seed
    tf.random.Generator.from_non_deterministic_state = lambda alg=None: generator(seeds.randrange(2**32), alg)


def _for_the_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Draws for all rows, of which a rank takes its own: the same numbers as on one process."""

    def draw(shape: Any, *args: Any, **kwargs: Any) -> Any:
        share = work.share()
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
        share = work.share()
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
        share, plain = work.share(), keras_random._cast_seed
        if share is None:
            return original(*args, **kwargs)
        keras_random._cast_seed = lambda seed: plain(seed) + share.engine.rank
        try:
            return original(*args, **kwargs)
        finally:
            keras_random._cast_seed = plain

    return draw
