"""Names that scripts import from `horovod.tensorflow.util`."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def vars_to_refs(vars: Any) -> Any:
    """Turn variables, also lists of them, into references that can be keys of a dictionary."""
    return tuple(vars_to_refs(each) for each in vars) if isinstance(vars, list) else vars.ref()


def refs_to_vars(refs: Any) -> Any:
    """Turn what `vars_to_refs` returned back into variables and lists of them."""
    return [refs_to_vars(each) for each in refs] if isinstance(refs, tuple) else refs.deref()


def _executing_eagerly() -> bool:
    return tf.executing_eagerly()


def _make_subgraph(f: Callable) -> Callable:
    return tf.function(f)
