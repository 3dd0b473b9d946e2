"""Work with nests of arrays: x, (x, y) and (x, y, sample_weight), each an array, a dict or a tuple of arrays."""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

NAMES = ("x", "y", "sample_weight")
_MANY = 10  # an error names at most this many arrays

Facts = list[tuple[str, str]]  # what must be the same on all ranks: names and values


def unpacked(data: Any) -> tuple[Any, Any, Any]:
    """Return x, y and sample_weight, None for a missing one; a tuple or list is read as in Keras."""
    if not isinstance(data, tuple | list) or _is_numbers(data):
        return data, None, None
    if not 1 <= len(data) <= 3 or data[0] is None:
        raise ValueError(
            "hvd.shard: data must be x, (x, y) or (x, y, sample_weight); several inputs go into their own "
            f"dict or tuple, as in ((x1, x2), y). Received: a {type(data).__name__} of {len(data)}."
        )
    return (*data, None, None)[:3]


def all_arrays(parts: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """Convert the leaves of x, y and sample_weight to NumPy arrays; see `arrays`."""
    x, y, weight = map(arrays, parts, NAMES)
    return x, y, weight


def arrays(value: Any, name: str) -> Any:
    """Convert the leaves of a nest to NumPy arrays, without a copy; raise TypeError for one without rows."""
    return mapped(_array, value, name)


def mapped(function: Callable[[Any, str], Any], value: Any, name: str = "") -> Any:
    """Call `function(leaf, name)` for each leaf of a nest; None stays None, and lists become tuples."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {key: mapped(function, item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, tuple | list) and not _is_numbers(value):
        return tuple(mapped(function, item, f"{name}[{i}]") for i, item in enumerate(value))
    return function(value, name)


def leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of a nest with names such as x['image'] or y[0]."""
    found: list[tuple[str, Any]] = []
    mapped(lambda leaf, path: found.append((path, leaf)), value, name)
    return found


def length(parts: tuple[Any, Any, Any]) -> int:
    """Return the number of samples.

    Raises:
        ValueError: If arrays have different lengths (each is named), or one has no dimension.
    """
    lengths: dict[str, int] = {}
    for part, label in zip(parts, NAMES, strict=True):
        for name, leaf in leaves(part, label):
            if leaf.ndim == 0:
                raise ValueError(
                    f"hvd.shard: {name} is a single number; its first dimension must be the samples."
                )
            lengths[name] = len(leaf)
    if not lengths:
        raise ValueError("hvd.shard: there are no arrays in the data. Received: None.")
    if len(set(lengths.values())) > 1:
        listed = [f"{name}: {count}" for name, count in lengths.items()]
        lists = ""
        if len(listed) > _MANY:
            listed[_MANY // 2 : -_MANY // 2] = ["…"]
            lists = " A list is read as several inputs, as in fit: numpy.array(list) makes one of it."
        raise ValueError(
            f"hvd.shard: all arrays must hold the same number of samples. Received: {', '.join(listed)}.{lists}"
        )
    return next(iter(lengths.values()))


def rows(value: Any, indices: np.ndarray) -> Any:
    """Take rows from every leaf; floats become `keras.config.floatx()`, as in `fit` with arrays."""
    return mapped(lambda leaf, _: as_keras(leaf[indices]), value)


def as_keras(array: np.ndarray) -> np.ndarray:
    """Cast floats of other widths to `keras.config.floatx()`."""
    return array.astype(keras.config.floatx(), copy=False) if array.dtype.kind == "f" else array


def all_described(parts: tuple[Any, Any, Any]) -> Facts:
    """Return the facts of x, y and sample_weight that ranks compare; see `described`."""
    return [fact for part, name in zip(parts, NAMES, strict=True) for fact in described(part, name)]


def described(part: Any, label: str) -> Facts:
    """Return the facts that ranks compare: dtype and shape of every leaf, and a checksum of some samples."""
    facts = []
    for name, leaf in leaves(part, label):
        facts.append((name, f"{leaf.dtype} of shape (any, {', '.join(map(str, leaf.shape[1:]))})"))
        facts.append((f"the content of {name}", f"checksum {checksum(spread(leaf)):08x}"))
    return facts


def spread(array: np.ndarray) -> np.ndarray:
    """Return at most 16 rows, evenly spread."""
    return array[np.unique(np.linspace(0, len(array) - 1, min(len(array), 16)).astype(int))]


def checksum(array: Any, before: int = 0) -> int:
    """Continue the CRC-32 `before` by an array's bytes, or by its text if it holds Python objects."""
    array = np.ascontiguousarray(array)
    if array.dtype.hasobject:
        return zlib.crc32(repr(array.tolist()).encode(), before)
    # A view, because a copy of a whole data set could exceed the memory.
    return zlib.crc32(array.reshape(-1).view(np.uint8), before)


def checksum_of_all(leaves: Iterable[np.ndarray], rows: int | None = None) -> int:
    """Return the CRC-32 over several arrays, their shapes and dtypes included.

    Args:
        rows: Approximate number of rows of each that are read, evenly spread; None for all.
    """
    value = 0
    for array in leaves:
        value = zlib.crc32(f"{array.dtype}{array.shape}".encode(), value)
        value = checksum(array[:: max(len(array) // rows, 1)] if rows and array.ndim else array, value)
    return value


def _array(leaf: Any, name: str) -> np.ndarray:
    if isinstance(leaf, np.ndarray):
        return leaf
    if isinstance(leaf, list | tuple) or (hasattr(leaf, "__array__") and hasattr(leaf, "shape")):
        try:
            return np.asarray(leaf)
        except Exception as error:
            raise TypeError(f"hvd.shard: {name} cannot be read as an array: {error}") from error
    if callable(leaf):
        called = f"{getattr(leaf, '__name__', 'make_batches')}()".replace("<lambda>", "make_batches")
        raise TypeError(
            f"hvd.shard: {name} is a function. Call it, if it makes a generator: hvd.shard({called}, …); or "
            "make a tf.data.Dataset of it: tf.data.Dataset.from_generator(…)."
        )
    kind = f"{type(leaf).__module__}.{type(leaf).__name__}"
    if "sparse" in kind.lower():
        raise TypeError(
            f"hvd.shard: {name} is sparse, a {kind}, and sparse data cannot be divided by rows. Pass it dense: "
            "tf.sparse.to_dense(x), or x.toarray() of SciPy. If that is too large, make batches dense: "
            "hvd.shard(tf.data.Dataset.from_tensor_slices((x, y)).batch(256).map(lambda x, y: "
            "(tf.sparse.to_dense(x), y))), with x as a tf.SparseTensor."
        )
    raise TypeError(
        f"hvd.shard: {name} must be a NumPy array, or something that becomes one. Received: "
        f"{kind}. Ragged data go into a tf.data.Dataset."
    )


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], int | float | str | bytes)
