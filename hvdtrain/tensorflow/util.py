"""Provide helper functions that scripts import from Horovod, and read its deprecated arguments."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvdtrain.collectives.engine import Engine, Op


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


def split_list(l: Sequence[Any], n: int) -> list[Sequence[Any]]:  # noqa: E741 - the name is Horovod's
    """Split a list into `n` parts in order, with lengths that differ by at most one."""
    length, longer = divmod(len(l), n)
    starts = [i * length + min(i, longer) for i in range(n + 1)]
    return [l[start:end] for start, end in itertools.pairwise(starts)]


def check_extension(ext_name: str, ext_env_var: str, pkg_path: str, *args: str) -> None:
    """Do nothing. In Horovod this checks its compiled extension, which hvdtrain does not have."""


def gpu_available(ext_base_name: str = "tensorflow", verbose: bool = False) -> bool:
    """Return whether TensorFlow sees a GPU in this process."""
    return bool(tf.config.list_physical_devices("GPU"))


def check_num_rank_power_of_2(num_rank: int) -> bool:
    """Return whether Adasum can combine this number of ranks: it must be a power of two."""
    return num_rank > 0 and num_rank & (num_rank - 1) == 0


def check_adasum(engine: Engine, op: Op) -> None:
    """Raise NotImplementedError for Adasum on a number of ranks that is not a power of two."""
    if op is Op.ADASUM and not check_num_rank_power_of_2(engine.size):
        raise NotImplementedError(
            f"Adasum combines 2, 4, 8, ... ranks, but here are {engine.size} ranks. Use hvd.Average, or another "
            "number of ranks."
        )


def handle_average_backwards_compatibility(op: Op | int | str | None, average: bool | None) -> Op:
    """Return the reduction that `op` or the older argument `average` names.

    Args:
        op: The reduction, or None.
        average: True for a mean, False for a sum, None if not given. Deprecated.

    Returns:
        The reduction; AVERAGE if neither is given.

    Raises:
        ValueError: If both are given.
    """
    if op is not None and average is not None:
        raise ValueError(f"op replaces average; give only one of them. Received: {op=}, {average=}.")
    if average is not None:
        _warn_deprecated("The argument average is deprecated: use op=hvd.Average or op=hvd.Sum.")
        return Op.AVERAGE if average else Op.SUM
    return Op.AVERAGE if op is None else Op.of(op)


def groups_or_num_groups(groups: Any, num_groups: int) -> Any:
    """Return the groups of gradients that `groups` or the older argument `num_groups` defines."""
    if num_groups == 0:
        return groups
    _warn_deprecated("The argument num_groups is deprecated: use groups.")
    return num_groups if groups is None else groups


def _warn_deprecated(message: str) -> None:
    warnings.warn(
        message, DeprecationWarning, stacklevel=4
    )  # names the caller of the function with the argument
