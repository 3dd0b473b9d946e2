"""Save and restore the state of callbacks, so that a resumed run makes the same decisions."""

import collections
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain.checkpoints import plain

_PREFIX = "callback/"
# Set by Keras, or concerning only the output.
_NOT_STATE = ("params", "_params", "validation_data", "model", "_model", "verbose")
# Keras changes the sign of this attribute once per process, when it determines the mode of the metric.
_MONITORING = ("min_delta",)
# Of a CSVLogger only these and the length of its file are saved; it creates the rest at the start.
_CSV = ("keys",)
_END = "end of the file"


class CallbackStates:
    """The attributes of callbacks that have changed since training began and are plain values.

    Attributes that only the constructor sets (EarlyStopping's patience) are taken from the script, which may have
    been edited.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        numbers: collections.Counter[str] = collections.Counter()
        self._named: dict[str, Any] = {}
        for callback in callbacks:
            if not isinstance(callback, keras.callbacks.ProgbarLogger):
                name = type(callback).__name__
                self._named[f"{_PREFIX}{name}/{numbers[name]}"] = callback
                numbers[name] += 1
        self._at_first: dict[str, bytes] = {}
        self._restored: set[str] = set()

    def begin(self) -> None:
        """Record the attributes before the first epoch."""
        self._at_first = {name: plain.digest(value) for name, value in self._all()}

    def prepare(self) -> None:
        """Set up callbacks before they begin, so that they continue their files."""
        for callback in self._named.values():
            if isinstance(callback, keras.callbacks.CSVLogger):
                callback.append = True

    def capture(self) -> dict[str, Any]:
        """Return the changed attributes, under names that are the same in the next run."""
        return {
            name: value
            for name, value in self._all()
            if name in self._restored or plain.digest(value) != self._at_first.get(name)
        }

    def restore(self, values: Mapping[str, Any]) -> list[str]:
        """Set the captured attributes among `values`; return the callbacks with such that this `fit` lacks."""
        missing = set()
        for name, value in values.items():
            if not name.startswith(_PREFIX):
                continue
            owner, _, attribute = name.rpartition("/")
            callback = self._named.get(owner)
            if callback is None:
                missing.add(owner.split("/")[1])
            elif attribute == _END:
                _truncate(callback.csv_file, value)
            else:
                _put_back(vars(callback), attribute, value)
                self._restored.add(name)
        return sorted(missing)

    def _all(self) -> Iterator[tuple[str, Any]]:
        for name, callback in self._named.items():
            csv = isinstance(callback, keras.callbacks.CSVLogger)
            left_out = _NOT_STATE + _MONITORING if hasattr(callback, "monitor_op") else _NOT_STATE
            for attribute, value in sorted(vars(callback).items()):
                value = _content(value)
                if attribute not in left_out and (not csv or attribute in _CSV) and plain.is_plain(value):
                    yield f"{name}/{attribute}", value
            if csv and getattr(callback, "csv_file", None) and not callback.csv_file.closed:
                yield f"{name}/{_END}", callback.csv_file.tell()


def _truncate(file: Any, end: int) -> None:
    """Remove rows that were written after the checkpoint, since they will be written again."""
    if file is not None and not file.closed and end <= file.seek(0, 2):
        file.truncate(end)
        file.seek(end)


def _content(value: Any) -> Any:
    """Return the plain content of a variable or generator; other values unchanged."""
    if isinstance(value, keras.Variable | tf.Variable):
        return value.numpy()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else value


def _put_back(attributes: dict[str, Any], name: str, value: Any) -> None:
    """Set an attribute; change lists, sets and dicts in place, because the script may refer to them too."""
    now, value = attributes.get(name), copy.deepcopy(value)
    if isinstance(now, keras.Variable | tf.Variable):
        now.assign(value)
    elif isinstance(now, np.random.Generator):
        now.bit_generator.state = value
    elif type(now) is list and type(value) is list:
        now[:] = value
    elif isinstance(now, dict | set) and isinstance(value, dict | set):
        now.clear()
        now.update(value)
    else:
        attributes[name] = value
