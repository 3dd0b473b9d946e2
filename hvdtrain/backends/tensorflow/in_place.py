"""Gradients reduced in TensorFlow's own memory: how it is taken over, and what must be copied all the same."""

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
_MOST_PLACES = 4096  # a training that needs more moves its gradients about, and gains nothing
# Operations of TensorFlow that hand on the memory they are given.
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

_large: set[tuple[int, int]] = set()
_zeros: list[Any] = []
_numbers = itertools.count(2)


def ours(tensor: Any) -> Any:
    """Take a tensor of a graph over, so that its memory may be written to: no copy where nobody else uses it.

    TensorFlow's Snapshot hands on the memory of a tensor that has no other user, and copies any other's.

    Args:
        tensor: Tensor of a graph.

    Returns:
        The same values, for one user only, or None where the copy into a shared buffer is cheaper, or where this
        cannot be done: eagerly, in a session's graph, or for memory that is Python's.
    """
    small = (
        not tensor.shape.is_fully_defined()
        or tensor.shape.num_elements() * tensor.dtype.size < fusion.ALONE_BYTES
    )
    if tf.executing_eagerly() or small or _is_of_python(tensor):
        return None
    if not tf.compat.v1.get_default_graph().building_function:
        return None
    with tf.device("CPU:0"):
        return tf.raw_ops.Snapshot(input=_unknown(tensor))


def changed(mine: Any) -> Any:
    """Return what a tensor of `ours` holds when all has happened that this is called to depend on."""
    return _unknown(mine)


def _unknown(tensor: Any) -> Any:
    """Hand on the memory of a tensor in such a way that only the running graph knows what it holds.

    TensorFlow takes it that no tensor ever changes. So it would compute a constant, and what follows from it,
    before the graph runs; what is alike only once; and what follows from a tensor of `ours` from the tensor before
    it. Of a part whose begin is known only as the graph runs, nobody can know what it holds. It is the whole, which
    TensorFlow does not copy.
    """
    begin = tf.fill([tensor.shape.rank], _zero().read_value() * next(_numbers))
    return tf.slice(tensor, begin, tf.constant(tensor.shape.as_list(), tf.int64))


def _is_of_python(tensor: Any) -> bool:
    """Return whether a tensor may lie in memory that Python has made, and may use again."""
    operation = tensor.op
    while operation.type in _SAME_MEMORY:
        operation = operation.inputs[0].op
    return "PyFunc" in operation.type


def writable(arrays: Sequence[np.ndarray], stays: Sequence[bool]) -> list[np.ndarray]:
    """Return arrays that may be written to of those that TensorFlow has handed over for good."""
    seen: set[int] = set()
    result = []
    for array, stay in zip(arrays, stays, strict=True):
        if stay and array.flags.owndata:
            raise RuntimeError(
                "TensorFlow has copied a gradient on its way to NumPy, so it cannot be reduced where it lies. "
                "Please report this with your version of TensorFlow."
            )
        if stay and array.ctypes.data in seen:
            raise RuntimeError(
                "TensorFlow has put two gradients in one place, so they cannot be reduced where they lie. "
                "Please report this with your version of TensorFlow."
            )
        if stay:
            seen.add(array.ctypes.data)
            _use_large_pages(array)
            memory: Any = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
            memory.owner = array  # which keeps TensorFlow from giving the memory to somebody else
            array = np.frombuffer(memory, array.dtype).reshape(array.shape)
        result.append(array)
    return result


def _use_large_pages(array: np.ndarray) -> None:
    """Ask the kernel to put an array on pages of 2 MiB: MPI looks up each page that it copies to another rank.

    For 25 MB in one gradient on two ranks 3.7 ms in place of 6.6; for 31 MB in many, which share pages with their
    neighbours, 3.8 ms in place of 4.9. TensorFlow gives a gradient the same place in each step.
    """
    start = array.ctypes.data // _PAGE * _PAGE
    length = -(-(array.ctypes.data + array.nbytes) // _PAGE) * _PAGE - start
    if (start, length) in _large or len(_large) >= _MOST_PLACES:
        return
    _large.add((start, length))
    for advice in (_HUGEPAGE, _COLLAPSE):  # what a kernel does not know, it refuses
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def _zero() -> Any:
    if not _zeros:
        _zeros.append(host_calls.counter("hvdtrain_zero"))
    return _zeros[0]
