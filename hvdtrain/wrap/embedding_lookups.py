"""Rows of a weight that are looked up: Keras' optimizers square each occurrence by itself, so each must count once.

The gradient of a lookup comes in pieces, one for each place where a row was asked for, and the pieces of all
ranks are put one after the other. So one process has them too, if no two ranks look up for the same place.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import numpy as keras_numpy

from hvdtrain.patching import replace
from hvdtrain.wrap import context
from hvdtrain.wrap.row_shard import Share


def install() -> None:
    """Changes `keras.layers.Embedding`, and the product of a sparse and a dense matrix."""
    replace(keras.layers.Embedding, "call", _each_place_once)
    replace(keras_numpy, "matmul", _of_sparse)


def _each_place_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Divides the places among the ranks, where they are not the places of a rank's rows, such as positions."""

    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        engine, rows = context.engine(), context.share()
        if engine is None or not isinstance(inputs, tf.Tensor) or (rows is not None and _is_of(inputs, rows)):
            return original(self, inputs, *args, **kwargs)
        places = tf.reshape(inputs, [-1])
        share = Share.of(engine, tf.shape(places)[0])
        found = share.join(original(self, share.take(places), *args, **kwargs))
        found = tf.reshape(found, tf.concat([tf.shape(inputs), [found.shape[-1]]], 0))
        found.set_shape([*inputs.shape, found.shape[-1]])
        return found if rows is None else rows.replicated(found)

    return call


def _is_of(inputs: Any, share: Share) -> bool:
    known = tf.get_static_value(share.rows)
    return inputs.shape.rank != 0 and inputs.shape[0] in (None, None if known is None else int(known))


def _of_sparse(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the dense matrix one gradient for each of its rows."""

    def matmul(x1: Any, x2: Any) -> Any:
        if (
            context.engine() is not None
            and isinstance(x1, tf.SparseTensor)
            and not isinstance(x2, tf.SparseTensor)
        ):
            x2 = _summed(tf.convert_to_tensor(x2))
        return original(x1, x2)

    return matmul


@tf.custom_gradient
def _summed(tensor: Any) -> Any:
    return tf.identity(tensor), tf.convert_to_tensor
