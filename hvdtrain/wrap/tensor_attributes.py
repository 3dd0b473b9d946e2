"""Move a tensor together with what Keras keeps on it: its mask, and the logits behind an activation.

Keras computes crossentropy from the logits behind a softmax or sigmoid. It finds them in `_keras_logits`, or as the
input of the tensor's own operation (`_get_logits` in `keras/src/backend/tensorflow/nn.py`). A copy of the tensor
has neither, and its loss is computed from clipped probabilities.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_ACTIVATIONS = {"Softmax": tf.nn.softmax, "Sigmoid": tf.nn.sigmoid}

Tensor = Any


def moved(tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `move(tensor)`, with mask and logits moved likewise.

    Args:
        tensor: A tensor with rows.
        move: Takes some rows of a tensor, or joins them.
    """
    mask, logits = getattr(tensor, "_keras_mask", None), getattr(tensor, "_keras_logits", None)
    operation = getattr(tensor, "op", None) if isinstance(tensor, tf.Tensor) else None
    if operation is not None and operation.type in _ACTIVATIONS:
        # Computed again from the moved logits: the operation behind the result is the same, and one tensor is sent.
        (behind,) = operation.inputs
        moved_behind = move(behind)
        result = _ACTIVATIONS[operation.type](moved_behind)
        if logits is behind:
            result._keras_logits, logits = moved_behind, None
    else:
        result = move(tensor)
    if logits is not None:
        result._keras_logits = move(tf.convert_to_tensor(logits))
    if mask is not None:
        result._keras_mask = move(tf.convert_to_tensor(mask))
    return result


def kept_on(tensor: Tensor) -> list[Tensor]:
    """List the mask and the logits that Keras keeps on a tensor."""
    kept = [getattr(tensor, name, None) for name in ("_keras_mask", "_keras_logits")]
    return [value for value in kept if value is not None]
