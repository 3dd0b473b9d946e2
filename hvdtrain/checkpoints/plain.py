"""Plain Python values and arrays in one `.npz`, exact to the bit, which NumPy opens and nothing executes."""

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

_DEEPEST = 20
_JSON = "json"


class NotPlainError(TypeError):
    """A value that is neither a number, a text, bytes, an array, nor a list, tuple, set or dict of such."""


def is_plain(value: Any) -> bool:
    """Return whether `packed` takes a value."""
    try:
        _pack(value, [])
    except NotPlainError:
        return False
    return True


def packed(value: Any) -> bytes:
    """Write a value as the bytes of an `.npz` file.

    Args:
        value: None, a bool, int, float, complex, str, bytes or NumPy array, or a list, tuple, set or dict (a
            Counter, say, which comes back as a dict) of these, to any depth that a person would write.

    Returns:
        The file's bytes: the arrays, and under "json" how they lie in the value.

    Raises:
        NotPlainError: If there is anything else in it.
    """
    arrays: list[np.ndarray] = []
    text = json.dumps(_pack(value, arrays))
    buffer = io.BytesIO()
    named = {f"array_{index}": _storable(each) for index, each in enumerate(arrays)}
    np.savez(buffer, **{_JSON: np.array(text), **named})  # type: ignore[arg-type]
    return buffer.getvalue()


def unpacked(content: bytes) -> Any:
    """Read what `packed` has written."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return _unpack(json.loads(str(file[_JSON])), file)


def digest(value: Any) -> bytes:
    """Return 16 bytes that are the same for two plain values only if these are the same to the bit."""
    arrays: list[np.ndarray] = []
    hashed = hashlib.blake2b(json.dumps(_pack(value, arrays)).encode(), digest_size=16)
    for each in arrays:
        hashed.update(np.ascontiguousarray(each).reshape(-1).view(np.uint8).data)
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
        items = [_pack(each, arrays, depth + 1) for each in value]
        return items if type(value) is list else {"tuple": items}
    if type(value) in (set, frozenset):
        # In an order that is the same in every process.
        return {type(value).__name__: [_pack(each, arrays, depth + 1) for each in sorted(value, key=repr)]}
    if isinstance(value, dict):
        pairs = [[_pack(part, arrays, depth + 1) for part in pair] for pair in value.items()]
        return {"dict": pairs}
    raise NotPlainError(type(value).__name__)


def _unpack(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_unpack(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    for made in (tuple, set, frozenset):
        if made.__name__ in value:
            return made(_unpack(each, arrays) for each in value[made.__name__])
    if "bytes" in value:
        return bytes.fromhex(value["bytes"])
    if "complex" in value:
        return complex(*value["complex"])
    if "dict" in value:
        return {_unpack(key, arrays): _unpack(each, arrays) for key, each in value["dict"]}
    kind = "array" if "array" in value else "number"
    array = _restored(arrays[f"array_{value[kind]}"], value["dtype"], value["shape"])
    return array if kind == "array" else array[()]


def _storable(array: np.ndarray) -> np.ndarray:
    """NumPy's files do not know bfloat16 and its like, whose bytes do as well."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.dtype.kind == "V" else array


def _restored(array: np.ndarray, dtype: str, shape: list[int]) -> np.ndarray:
    if array.dtype.name == dtype or array.dtype.kind in "US":
        return array
    import ml_dtypes

    return array.view(getattr(ml_dtypes, dtype)).reshape(shape)
