"""Divide embedding lookups among the ranks, so that sparse gradients contain each lookup exactly once.

The gradient of a lookup has one slice for each index that was looked up, and the slices of all ranks are
concatenated. Keras optimizers square each slice separately. The result equals that of one process only if no two
ranks look up the same position.
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
    """Change `keras.layers.Embedding`, and the product of a sparse and a dense matrix."""
    replace(keras.layers.Embedding, "call", _lookup_once)
    replace(keras_numpy, "matmul", _matmul_of_sparse)


def _lookup_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Divide the indices among the ranks where they do not belong to the rows of a rank, such as positions."""

    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        engine, rows = context.engine(), context.share()
        if (
            engine is None
            or not isinstance(inputs, tf.Tensor)
            or (rows is not None and _has_rows_of(inputs, rows))
        ):
            return original(self, inputs, *args, **kwargs)
        indices = tf.reshape(inputs, [-1])
        share = Share.of(engine, tf.shape(indices)[0])
        found = share.join(original(self, share.take(indices), *args, **kwargs))
        found = tf.reshape(found, tf.concat([tf.shape(inputs), [found.shape[-1]]], 0))
        found.set_shape([*inputs.shape, found.shape[-1]])
        return found if rows is None else rows.replicated(found)

    return call


def _has_rows_of(inputs: Any, share: Share) -> bool:
    known = tf.get_static_value(share.rows)
    return inputs.shape.rank != 0 and inputs.shape[0] in (None, None if known is None else int(known))


def _matmul_of_sparse(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give the dense matrix a gradient with one row for each of its rows, instead of one for each lookup."""

    def matmul(x1: Any, x2: Any) -> Any:
        if (
            context.engine() is not None
            and isinstance(x1, tf.SparseTensor)
            and not isinstance(x2, tf.SparseTensor)
        ):
            x2 = _with_dense_gradient(tf.convert_to_tensor(x2))
        return original(x1, x2)

    return matmul


@tf.custom_gradient
def _with_dense_gradient(tensor: Any) -> Any:
    return tf.identity(tensor), tf.convert_to_tensor
