"""What callbacks have learned while training, so that one that goes on decides as if it had never stopped."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain.checkpoints import plain

# Set by Keras, or a matter of the screen.
_NOT_STATE = ("params", "_params", "validation_data", "model", "_model", "verbose")
# Keras turns its sign around once in a process, when it has found out what the monitored number is.
_MONITORING = ("min_delta",)
_WITHOUT_STATE = (keras.callbacks.ProgbarLogger,)
# Of a CSVLogger's file the end counts; the rest is made anew when it begins.
_CSV = ("keys",)
_END = "end of the file"


class CallbackStates:
    """The attributes of callbacks that have changed since training began, as far as they are plain values.

    What the constructor sets and nothing changes (EarlyStopping's patience) is the script's, which may be edited.

    Args:
        callbacks: The callbacks of a `fit`.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        numbers: collections.Counter[str] = collections.Counter()
        self._named: dict[str, Any] = {}
        for each in callbacks:
            if not isinstance(each, _WITHOUT_STATE):
                name = type(each).__name__
                self._named[f"{name}/{numbers[name]}"] = each
                numbers[name] += 1
        self._at_first: dict[str, bytes] = {}
        self._restored: set[str] = set()

    def begin(self) -> None:
        """Record what is so before the first epoch."""
        self._at_first = {name: plain.digest(value) for name, value in self._all()}

    def prepare(self) -> None:
        """Let callbacks that would begin anew go on where they were; called before they begin."""
        for each in self._named.values():
            if isinstance(each, keras.callbacks.CSVLogger):
                each.append = True

    def capture(self) -> dict[str, Any]:
        """Return what has changed, by names that are the same in the next run."""
        return {
            name: value
            for name, value in self._all()
            if name in self._restored or plain.digest(value) != self._at_first.get(name)
        }

    def restore(self, values: Mapping[str, Any]) -> list[str]:
        """Set what was captured.

        Returns:
            The callbacks of which a state is there that are not.
        """
        lost = set()
        for name, value in values.items():
            owner, _, attribute = name.rpartition("/")
            callback = self._named.get(owner)
            if callback is None:
                lost.add(owner.partition("/")[0])
            elif attribute == _END:
                _cut(callback.csv_file, value)
            else:
                _put_back(vars(callback), attribute, value)
                self._restored.add(name)
        return sorted(lost)

    def _all(self) -> Iterator[tuple[str, Any]]:
        for name, callback in self._named.items():
            csv = isinstance(callback, keras.callbacks.CSVLogger)
            left_out = (*_NOT_STATE, *(_MONITORING if hasattr(callback, "monitor_op") else ()))
            for attribute, value in sorted(vars(callback).items()):
                value = _content(value)
                if attribute not in left_out and (not csv or attribute in _CSV) and plain.is_plain(value):
                    yield f"{name}/{attribute}", value
            if csv and getattr(callback, "csv_file", None) and not callback.csv_file.closed:
                yield f"{name}/{_END}", callback.csv_file.tell()


def _cut(file: Any, end: int) -> None:
    """Take rows back that were written after the checkpoint, since they will be written again."""
    if file is not None and not file.closed and end <= file.seek(0, 2):
        file.truncate(end)
        file.seek(end)


def _content(value: Any) -> Any:
    """Return the plain content of what has one."""
    if isinstance(value, keras.Variable | tf.Variable):
        return value.numpy()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else value


def _put_back(attributes: dict[str, Any], name: str, value: Any) -> None:
    """Set an attribute; a list that the script knows too stays the same list."""
    now, value = attributes.get(name), plain.unpacked(plain.packed(value))
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
