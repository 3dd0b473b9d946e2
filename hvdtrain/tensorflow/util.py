"""Names that scripts import from `horovod.tensorflow.util`."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def vars_to_refs(vars: Any) -> Any:
    """Return hashable references to variables, also for nested lists of variables."""
    return tuple(vars_to_refs(variable) for variable in vars) if isinstance(vars, list) else vars.ref()


def refs_to_vars(refs: Any) -> Any:
    """Return the variables, or nested lists of them, of references from `vars_to_refs`."""
    return [refs_to_vars(reference) for reference in refs] if isinstance(refs, tuple) else refs.deref()


def _executing_eagerly() -> bool:
    return tf.executing_eagerly()


def _make_subgraph(f: Callable) -> Callable:
    return tf.function(f)
