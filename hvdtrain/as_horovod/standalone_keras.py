"""Provide `horovod.keras`: hvdtrain.keras, with the arguments in the order of this older module of Horovod."""

from typing import Any

import hvdtrain.keras
from hvdtrain.keras import *  # noqa: F403 - the same names, all of them
from hvdtrain.keras import Average, Compression


def DistributedOptimizer(  # type: ignore[no-redef]  # noqa: N802 - the name is Horovod's
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = Average,
    num_groups: int = 0,
    groups: Any = None,
    **more: Any,
) -> Any:
    """Make an optimizer train one model on all ranks; see `hvdtrain.keras.DistributedOptimizer`."""
    in_order = (device_dense, device_sparse, compression, sparse_as_dense, gradient_predivide_factor, op)
    return hvdtrain.keras.DistributedOptimizer(
        optimizer, name, *in_order, num_groups=num_groups, groups=groups, **more
    )
