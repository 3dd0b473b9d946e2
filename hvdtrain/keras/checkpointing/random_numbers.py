"""Save and restore the global random generators of Python, NumPy and TensorFlow."""

import contextlib
import random
from typing import Any

import numpy as np
import tensorflow as tf

_PYTHON, _NUMPY, _TENSORFLOW = "random/python", "random/numpy", "random/tensorflow"


def capture() -> dict[str, Any]:
    """Return their states as plain values."""
    found: dict[str, Any] = {_PYTHON: random.getstate(), _NUMPY: np.random.get_state()}
    with contextlib.suppress(RuntimeError):  # with enable_op_determinism there may be no generator
        found[_TENSORFLOW] = tf.random.get_global_generator().state.numpy()
    return found


def restore(states: dict[str, Any], newcomer: int | None = None) -> None:
    """Set their states.

    Args:
        states: The result of `capture`.
        newcomer: The rank, if it did not exist when they were captured; it then gets a different state.
    """
    if _PYTHON in states:
        random.setstate(states[_PYTHON])
    if _NUMPY in states:
        np.random.set_state(states[_NUMPY])
    if _TENSORFLOW in states:
        tf.random.get_global_generator().state.assign(states[_TENSORFLOW])
    if newcomer is not None:
        drawn = np.random.SeedSequence((random.getrandbits(64), newcomer)).generate_state(2)
        random.seed(int(drawn[0]))
        np.random.seed(int(drawn[1]))
