"""Store plain Python values and arrays exactly in one `.npz` file, without pickle."""

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

_DEEPEST = 20
_JSON = "json"


class NotPlainError(TypeError):
    """Raised for a value that is not a number, str, bytes, array, or a list, tuple, set or dict of these."""


def is_plain(value: Any) -> bool:
    """Return whether `packed` accepts a value."""
    try:
        _pack(value, [])
    except NotPlainError:
        return False
    return True


def packed(value: Any) -> bytes:
    """Convert a value to the bytes of an `.npz` file.

    Args:
        value: None, a bool, int, float, complex, str, bytes or NumPy array, or a list, tuple, set or dict
            of these, at most 20 levels deep. A Counter is restored as a dict.

    Raises:
        NotPlainError: If it contains any other object.
    """
    arrays: list[np.ndarray] = []
    text = json.dumps(_pack(value, arrays))
    buffer = io.BytesIO()
    named = {f"array_{index}": _storable(array) for index, array in enumerate(arrays)}
    np.savez(buffer, **{_JSON: np.array(text), **named})  # type: ignore[arg-type]
    return buffer.getvalue()


def unpacked(content: bytes) -> Any:
    """Return the value from the bytes that `packed` has made."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return _unpack(json.loads(str(file[_JSON])), file)


def digest(value: Any) -> bytes:
    """Return a hash of 16 bytes, equal for two plain values only if they are identical bit for bit."""
    arrays: list[np.ndarray] = []
    hashed = hashlib.blake2b(json.dumps(_pack(value, arrays)).encode(), digest_size=16)
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hashed.digest()


def _pack(value: Any, arrays: list[np.ndarray], depth: int = 0) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if (
        isinstance(value, np.ndarray | np.generic)
        and value.dtype.kind in "biufcVUS"
        and not value.dtype.names
    ):
        arrays.append(np.asarray(value))
        shape, kind = list(arrays[-1].shape), "array" if isinstance(value, np.ndarray) else "number"
        return {kind: len(arrays) - 1, "dtype": value.dtype.name, "shape": shape}
    if type(value) in (bytes, complex):
        return {type(value).__name__: value.hex() if type(value) is bytes else [value.real, value.imag]}
    if depth == _DEEPEST:
        raise NotPlainError("nested too deeply")
    if type(value) in (list, tuple):
        items = [_pack(item, arrays, depth + 1) for item in value]
        return items if type(value) is list else {"tuple": items}
    if type(value) in (set, frozenset):
        # Sorted, so that the order is the same in every process.
        return {type(value).__name__: [_pack(item, arrays, depth + 1) for item in sorted(value, key=repr)]}
    if isinstance(value, dict):
        pairs = [[_pack(part, arrays, depth + 1) for part in pair] for pair in value.items()]
        return {"dict": pairs}
    raise NotPlainError(type(value).__name__)


def _unpack(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    for made in (tuple, set, frozenset):
        if made.__name__ in value:
            return made(_unpack(item, arrays) for item in value[made.__name__])
    if "bytes" in value:
        return bytes.fromhex(value["bytes"])
    if "complex" in value:
        return complex(*value["complex"])
    if "dict" in value:
        return {_unpack(key, arrays): _unpack(item, arrays) for key, item in value["dict"]}
    kind = "array" if "array" in value else "number"
    array = _restored(arrays[f"array_{value[kind]}"], value["dtype"], value["shape"])
    return array if kind == "array" else array[()]


def _storable(array: np.ndarray) -> np.ndarray:
    """Return the bytes of an array of bfloat16 or a similar dtype, which NumPy's files do not support."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.dtype.kind == "V" else array


def _restored(array: np.ndarray, dtype: str, shape: list[int]) -> np.ndarray:
    if array.dtype.name == dtype or array.dtype.kind in "US":
        return array
    import ml_dtypes

    return array.view(getattr(ml_dtypes, dtype)).reshape(shape)
