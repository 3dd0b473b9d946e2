"""Give write access to the memory of TensorFlow's gradients, so that they are reduced in place."""

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.backends.tensorflow import host_calls
from hvdtrain.collectives import fusion

_PAGE = 2 << 20
_HUGEPAGE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE and MADV_COLLAPSE of Linux
_MOST_RANGES = 4096  # if a training needs more, its gradients change their place, and large pages do not help
# Operations of TensorFlow whose output uses the memory of their input.
_SAME_MEMORY = {
    "Identity",
    "Reshape",
    "Squeeze",
    "ExpandDims",
    "EnsureShape",
    "StopGradient",
    "PreventGradient",
}
_libc = ctypes.CDLL(None)

_advised: set[tuple[int, int]] = set()
_zeros: list[Any] = []
_numbers = itertools.count(2)


def take_over(tensor: Any) -> Any:
    """Return a tensor of a graph whose memory may be written to; it is copied only if it has other users.

    TensorFlow's Snapshot returns the memory of a tensor that has no other user, and copies any other tensor.

    Args:
        tensor: Tensor of a graph.

    Returns:
        A tensor with the same values and one user, or None if a copy into a shared buffer is cheaper, or if this is
        not possible: eagerly, in a session's graph, or for memory that Python owns.
    """
    small = (
        not tensor.shape.is_fully_defined()
        or tensor.shape.num_elements() * tensor.dtype.size < fusion.ALONE_BYTES
    )
    if tf.executing_eagerly() or small or _is_owned_by_python(tensor):
        return None
    if not tf.compat.v1.get_default_graph().building_function:
        return None
    with tf.device("CPU:0"):
        return tf.raw_ops.Snapshot(input=_hide_values(tensor))


def read_after_change(tensor: Any) -> Any:
    """Return the values of a tensor from `take_over` after all operations on which this read depends."""
    return _hide_values(tensor)


def _hide_values(tensor: Any) -> Any:
    """Return a tensor with the same memory, whose values TensorFlow cannot know before the graph runs.

    TensorFlow assumes that tensors never change. Without this, it would compute constants, and results that depend
    on them, before the graph runs; compute equal expressions only once; and compute results that depend on a tensor
    from `take_over` with the tensor before it. TensorFlow cannot do so for a slice whose begin is known only when
    the graph runs. This slice is the whole tensor, which TensorFlow does not copy.
    """
    begin = tf.fill([tensor.shape.rank], _zero().read_value() * next(_numbers))
    return tf.slice(tensor, begin, tf.constant(tensor.shape.as_list(), tf.int64))


def _is_owned_by_python(tensor: Any) -> bool:
    """Return whether a tensor may lie in memory that Python has allocated, and may use again."""
    operation = tensor.op
    while operation.type in _SAME_MEMORY:
        operation = operation.inputs[0].op
    return "PyFunc" in operation.type


def writable(arrays: Sequence[np.ndarray], owned: Sequence[bool]) -> list[np.ndarray]:
    """Return the arrays, writable where their memory was taken over from TensorFlow permanently."""
    seen: set[int] = set()
    result = []
    for array, is_owned in zip(arrays, owned, strict=True):
        if is_owned and array.flags.owndata:
            raise RuntimeError(
                "TensorFlow has copied a gradient when converting it to NumPy, so it cannot be reduced in place. "
                "Please report this with your version of TensorFlow."
            )
        if is_owned and array.ctypes.data in seen:
            raise RuntimeError(
                "TensorFlow has stored two gradients in the same memory, so they cannot be reduced in place. "
                "Please report this with your version of TensorFlow."
            )
        if is_owned:
            seen.add(array.ctypes.data)
            _use_large_pages(array)
            memory: Any = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
            memory.owner = array  # keeps TensorFlow from using the memory for another tensor
            array = np.frombuffer(memory, array.dtype).reshape(array.shape)
        result.append(array)
    return result


def _use_large_pages(array: np.ndarray) -> None:
    """Ask the kernel to use pages of 2 MiB for an array: MPI looks up each page that it copies to another rank.

    An allreduce on two ranks takes 3.7 ms instead of 6.6 ms for 25 MB in one gradient, and 3.8 ms instead of 4.9 ms
    for 31 MB in many gradients, which share pages with their neighbors. TensorFlow stores a gradient at the same
    address in each step.
    """
    start = array.ctypes.data // _PAGE * _PAGE
    length = -(-(array.ctypes.data + array.nbytes) // _PAGE) * _PAGE - start
    if (start, length) in _advised or len(_advised) >= _MOST_RANGES:
        return
    _advised.add((start, length))
    for advice in (_HUGEPAGE, _COLLAPSE):  # a kernel rejects advice that it does not support
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def _zero() -> Any:
    if not _zeros:
        _zeros.append(host_calls.counter("hvdtrain_zero"))
    return _zeros[0]
