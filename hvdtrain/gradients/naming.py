"""Name variables for users, and for comparisons between ranks."""

import re
from collections.abc import Sequence
from typing import Any

from hvdtrain.collectives.engine import Call


def variable_name(variable: Any) -> str:
    """Return the name under which a user knows a variable: Keras' path, or TensorFlow's name."""
    return getattr(variable, "path", None) or variable.name


def plain_variable(variable: Any) -> Any:
    """Return TensorFlow's own variable, which a Keras variable contains."""
    # Not `value`, which casts inside an autocast scope.
    return getattr(variable, "_value", variable)


def compared_name(name: str) -> str:
    """Return the part of a weight's name that is the same on all ranks: layer and weight, without numbers."""
    return _compared(name, weights_only=True)


def described_call(
    kind: str, variables: Sequence[Any], details: Sequence[str], weights_only: bool = True
) -> Call:
    """Describe an operation on variables so that ranks can compare it.

    Keras numbers layers in the order of their creation, so on a rank that has built one more model the same layer
    is `dense_2` instead of `dense`; and if one rank loads a model from a file, its paths may lack the name of the
    model. Therefore numbers, and the part of a path before layer and weight, are shown but not compared.

    Args:
        kind: Name of the operation.
        variables: The variables, in order.
        details: A text for each variable, which must be the same on all ranks.
        weights_only: False if there are variables of optimizers, whose names contain whole paths of weights: then
            only the last word of a name is compared, such as kernel or momentum.

    Returns:
        The call, with one line for each variable.
    """
    named = [(variable_name(variable), detail) for variable, detail in zip(variables, details, strict=True)]
    return Call(
        kind,
        tuple(f"{_compared(name, weights_only)}: {detail}" for name, detail in named),
        tuple(f"{name}: {detail}" for name, detail in named),
    )


def _compared(name: str, weights_only: bool) -> str:
    unnumbered = re.sub(r"_[0-9]+(?=[/_]|$)", "", name)
    return "/".join(unnumbered.split("/")[-2:]) if weights_only else re.split("[/_]", unnumbered)[-1]
