"""Define the operations of a reduction and the dtypes it accepts, and prepare arrays for sending."""

import enum
import functools
from typing import Any

import cloudpickle
import numpy as np

# The array that is combined over the ranks, and the array for the result, which may be the same.
Pair = tuple[np.ndarray, np.ndarray]


class Op(enum.IntEnum):
    """Operations of a reduction, with the numbers that Horovod uses."""

    AVERAGE = 0
    SUM = 1
    ADASUM = 2
    MIN = 3
    MAX = 4
    PRODUCT = 5

    @classmethod
    def of(cls, op: "Op | int | str") -> "Op":
        """Read an operation from a constant, its number or its name."""
        if type(op) is cls:
            return op
        try:
            return cls[op.upper()] if isinstance(op, str) else cls(op)
        except (KeyError, ValueError):
            known = ", ".join(member.name.lower() for member in cls)
            raise ValueError(f"Unknown reduction op={op!r}; expected one of: {known}.") from None


FLOATS = {"float16", "bfloat16", "float32", "float64"}
REDUCIBLE = FLOATS | {
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"),
}


def operand(array: Any, function: str) -> np.ndarray:
    """Return an array that can be sent: contiguous, in this machine's byte order, without Python objects."""
    if type(array) is np.ndarray and array.flags.c_contiguous and _can_be_sent(array.dtype):
        return array
    if np.ma.isMaskedArray(array):
        raise TypeError(
            f"{function}: a masked array would lose its mask. Send its data and its mask, or fill it."
        )
    array = np.asarray(array, order="C")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.hasobject:
        raise TypeError(
            f"{function}: arrays of Python objects cannot be sent. Received dtype {array.dtype}. "
            "Use broadcast_object or allgather_object."
        )
    return array


def reducible(array: Any, op: Op, function: str) -> np.ndarray:
    """Return an array that can be reduced with `op`, or raise a TypeError that names `function`."""
    array = operand(array, function)
    _check_reducible(array.dtype, op, function)
    return array


@functools.lru_cache(256)
def _can_be_sent(dtype: np.dtype) -> bool:
    return dtype.isnative and not dtype.hasobject


@functools.lru_cache(256)  # NumPy needs longer for the name of a dtype than MPI for a small sum
def _check_reducible(dtype: np.dtype, op: Op, function: str) -> None:
    if dtype.name not in REDUCIBLE:
        raise TypeError(
            f"{function}: cannot reduce dtype {dtype}. Expected one of: {', '.join(sorted(REDUCIBLE))}."
        )
    if dtype == np.bool_ and op in (Op.SUM, Op.AVERAGE):
        raise TypeError(
            f"{function}: {op.name.lower()} of bool is not defined. Use max (any), min (all), or cast to int32."
        )
    if op is Op.ADASUM and dtype.name not in FLOATS:
        raise TypeError(
            f"{function}: Adasum uses the angle between gradients, so it needs floats. Received dtype {dtype}."
        )


@functools.lru_cache(256)
def carrier(dtype: np.dtype, op: Op) -> np.dtype:
    """Return the dtype in which values are summed.

    It is wider for 16-bit floats, whose sums lose bits, and for means of small integers, whose sums overflow.
    """
    if dtype.name in ("float16", "bfloat16"):
        return np.dtype(np.float32)
    if op is Op.AVERAGE and dtype.kind in "iu" and dtype.itemsize < 8:
        return np.dtype(np.int64)
    return dtype


def described(array: np.ndarray) -> str:
    """Return dtype and shape as text for an error message."""
    return f"{array.dtype} of shape {array.shape}"


def inner(array: np.ndarray) -> str:
    """Return the dimensions after the first as text; they must be the same on all ranks that join their rows."""
    return ", ".join(str(dimension) for dimension in array.shape[1:])


def pickled(value: Any) -> np.ndarray:
    """Return the bytes of a pickled object; functions that are defined in a script can be sent too."""
    return np.frombuffer(cloudpickle.dumps(value), np.uint8)
