"""Return the rank of this process and the numbers of ranks and hosts; call `hvd.init()` first."""

from hvdtrain import runtime


def rank() -> int:
    """Return the number of this process among all ranks, from 0 to `size() - 1`; rank 0 prints and saves."""
    return runtime.engine().world.rank


def size() -> int:
    """Return the number of ranks; multiply the batch size by it, and possibly the learning rate."""
    return runtime.engine().world.size


def local_rank() -> int:
    """Return the number of this process among the ranks of its host; its GPU has the same number."""
    return runtime.engine().world.local_rank


def local_size() -> int:
    """Return the number of ranks on this host."""
    return runtime.engine().world.local_size


def cross_rank() -> int:
    """Return the number of this host among the hosts that have a rank with this `local_rank()`."""
    return runtime.engine().world.cross_rank


def cross_size() -> int:
    """Return the number of hosts that have a rank with this `local_rank()`."""
    return runtime.engine().world.cross_size


def is_homogeneous() -> bool:
    """Return whether every host has the same number of ranks."""
    return runtime.engine().world.homogeneous
