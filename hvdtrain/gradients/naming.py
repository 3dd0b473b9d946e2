"""What variables are called: by people, and between ranks."""

import re
from collections.abc import Sequence
from typing import Any

from hvdtrain.collectives.base import Call


def variable_name(variable: Any) -> str:
    """Returns the name under which a user knows a variable: Keras' path, or TensorFlow's name."""
    return getattr(variable, "path", None) or variable.name


def described_call(kind: str, variables: Sequence[Any], details: Sequence[str]) -> Call:
    """Describes an operation on variables so that ranks can compare it.

    Keras numbers layers as they are made, so a rank that has built one model more calls the same layer
    `dense_2` instead of `dense`. Such numbers are shown but not compared.

    Args:
        kind: Name of the operation.
        variables: What it is about, in order.
        details: A text for each variable that must be the same on all ranks.

    Returns:
        The call, with one line for each variable.
    """
    named = [(variable_name(each), detail) for each, detail in zip(variables, details, strict=True)]
    return Call(
        kind,
        tuple(f"{re.sub(r'_[0-9]+(?=[/_]|$)', '', name)}: {detail}" for name, detail in named),
        tuple(f"{name}: {detail}" for name, detail in named),
    )
