"""Combine gradients by the angle between them (Adasum), so that the learning rate need not change with the ranks.

Maleki, Musuvathi, Mytkowicz, Saarikivi, Xu, Eksarevskiy, Ekanayake, Barsoum: "Scaling Distributed Training with
Adaptive Summation", MLSys 2021, https://arxiv.org/abs/2006.02924
"""

from collections.abc import Callable

import numpy as np


def combine(
    array: np.ndarray, rank: int, size: int, exchange: Callable[[np.ndarray, int], np.ndarray]
) -> np.ndarray:
    """Combine one array over all ranks, pair by pair: neighbours first, then pairs of pairs.

    Two orthogonal arrays are added, two equal ones are averaged, and between these cases the result is in between.

    Args:
        array: Float array of this rank; it is not changed.
        rank: This rank, 0 to size - 1.
        size: Number of ranks, a power of two.
        exchange: Exchanges an array with that of a partner rank.

    Returns:
        An array like `array`, the same to the bit on all ranks.

    Raises:
        NotImplementedError: If the number of ranks is not a power of two.
    """
    if size & (size - 1):
        raise NotImplementedError(
            f"Adasum pairs ranks, so their number must be a power of two. Received: {size} ranks. Start "
            f"{1 << size.bit_length() - 1} or {1 << size.bit_length()}, or use op=hvd.Average."
        )
    distance = 1
    while distance < size:
        received = exchange(array, rank ^ distance)
        # Both ranks compute the same sum of the same two terms in the same order, so both get the same bits.
        array = _combine_pair(array, received) if rank & distance == 0 else _combine_pair(received, array)
        distance *= 2
    return array


def _combine_pair(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    product = _dot(first, second)
    return _weight(product, _dot(first, first)) * first + _weight(product, _dot(second, second)) * second


def _weight(product: float, square: float) -> float:
    return 1.0 - product / (2.0 * square) if square else 1.0


def _dot(first: np.ndarray, second: np.ndarray) -> float:
    # Not with BLAS, which would start threads on cores that belong to other ranks.
    return float(np.einsum("i,i", first.reshape(-1), second.reshape(-1), dtype=np.float64))
