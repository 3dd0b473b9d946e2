"""Small questions that scripts ask Horovod about itself, answered for hvdtrain."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdtrain.collectives.engine import Engine, Op


def handle_average_backwards_compatibility(op: Op | int | str | None, average: bool | None) -> Op:
    """Read the reduction from `op`, or from the older argument `average`.

    Args:
        op: The reduction, or None.
        average: True for a mean, False for a sum, None if not given. Deprecated.

    Returns:
        The reduction; AVERAGE if neither is given.

    Raises:
        ValueError: If both are given.
    """
    if op is not None and average is not None:
        raise ValueError(f"op takes the place of average; give one of them. Received: {op=}, {average=}.")
    if average is not None:
        warnings.warn(
            "The argument average is deprecated: use op=hvd.Average or op=hvd.Sum.",
            DeprecationWarning,
            stacklevel=3,
        )
        return Op.AVERAGE if average else Op.SUM
    return Op.AVERAGE if op is None else Op.of(op)


def check_num_rank_power_of_2(num_rank: int) -> bool:
    """Return whether Adasum can combine this many ranks: it halves them until one is left."""
    return num_rank > 0 and num_rank & (num_rank - 1) == 0


def split_list(l: Sequence[Any], n: int) -> list[Sequence[Any]]:  # noqa: E741 - the name is Horovod's
    """Cut a list into `n` pieces in order, of lengths that differ by one at most."""
    length, longer = divmod(len(l), n)
    starts = [i * length + min(i, longer) for i in range(n + 1)]
    return [l[start:end] for start, end in itertools.pairwise(starts)]


def check_extension(ext_name: str, ext_env_var: str, pkg_path: str, *args: str) -> None:
    """Accept what Horovod's own modules ask at import; hvdtrain has no compiled part that could be missing."""


def gpu_available(ext_base_name: str = "tensorflow", verbose: bool = False) -> bool:
    """Return whether TensorFlow sees a GPU in this process."""
    return bool(tf.config.list_physical_devices("GPU"))


def check_adasum(engine: Engine, op: Op) -> None:
    """Raise NotImplementedError for Adasum on a number of ranks that is no power of two."""
    if op is Op.ADASUM and not check_num_rank_power_of_2(engine.size):
        raise NotImplementedError(
            f"Adasum combines 2, 4, 8, ... ranks; here are {engine.size}. Use hvd.Average, or another number of "
            "ranks."
        )


def groups_or_num_groups(groups: Any, num_groups: int) -> Any:
    """Read the groups of gradients from `groups`, or from the older argument `num_groups`."""
    if num_groups == 0:
        return groups
    warnings.warn("The argument num_groups is deprecated: use groups.", DeprecationWarning, stacklevel=3)
    return num_groups if groups is None else groups
