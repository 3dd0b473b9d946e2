"""Move a tensor together with the attributes that Keras adds: its mask, and the logits of an activation.

Keras computes crossentropy from the logits of a softmax or sigmoid. It finds them in `_keras_logits`, or as the
input of the operation that made the tensor (`_get_logits` in `keras/src/backend/tensorflow/nn.py`). A copy of the
tensor has neither, so Keras would compute its loss from clipped probabilities.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_ACTIVATIONS = {"Softmax": tf.nn.softmax, "Sigmoid": tf.nn.sigmoid}

Tensor = Any


def moved(tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `move(tensor)`, with mask and logits moved in the same way.

    Args:
        tensor: A tensor with rows.
        move: A function that takes some rows of a tensor, or joins the rows of all ranks.
    """
    mask, logits = getattr(tensor, "_keras_mask", None), getattr(tensor, "_keras_logits", None)
    operation = getattr(tensor, "op", None) if isinstance(tensor, tf.Tensor) else None
    if operation is not None and operation.type in _ACTIVATIONS:
        # Compute the activation again from the moved logits. So the result has the operation that Keras looks for,
        # and only one tensor is sent.
        (inputs,) = operation.inputs
        moved_inputs = move(inputs)
        result = _ACTIVATIONS[operation.type](moved_inputs)
        if logits is inputs:
            result._keras_logits, logits = moved_inputs, None
    else:
        result = move(tensor)
    if logits is not None:
        result._keras_logits = move(tf.convert_to_tensor(logits))
    if mask is not None:
        result._keras_mask = move(tf.convert_to_tensor(mask))
    return result


def keras_attributes(tensor: Tensor) -> list[Tensor]:
    """List the mask and the logits that Keras has stored on a tensor."""
    values = [getattr(tensor, name, None) for name in ("_keras_mask", "_keras_logits")]
    return [value for value in values if value is not None]
