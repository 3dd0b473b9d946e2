"""Send some elements of each gradient: the largest, or random ones."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hvdtrain.collectives.engine import Call, Engine, Op
from hvdtrain.collectives.ops import carrier
from hvdtrain.gradients.compression.checks import check_ratio
from hvdtrain.gradients.compression.pieces import as_given, pieces
from hvdtrain.gradients.schemes import Group, Scheme, State

# The threshold of the largest elements is estimated from this many of them, and set low enough that it very rarely
# leaves out one of the largest.
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class TopK(Scheme):
    """Sends the elements of largest magnitude of each gradient, as values and indices.

    All ranks gather those of all ranks, so a rank receives (size - 1) * ratio * 8 bytes per float32 element: on
    many ranks no less than without compression (Aji and Heafield 2017, arXiv:1704.05021).

    Args:
        ratio: The part of the elements that a rank sends, in (0, 1].
    """

    ratio: float

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def reduce(self, group: Group, engine: Engine, state: State) -> Group:
        """Gather the largest elements of all ranks and add them up."""
        if group.call:
            engine.agree(group.call)
        arrays = group.writable() if group.wants_errors else group.arrays
        flat = [array.reshape(-1) for array in arrays]
        chosen = [largest(array, _count(self.ratio, array.size)) for array in flat]
        dtype = np.result_type(*(carrier(array.dtype, Op.SUM) for array in flat))
        values = np.concatenate(
            [array[indices].astype(dtype) for array, indices in zip(flat, chosen, strict=True)]
        )
        indices = np.concatenate(chosen)
        packed = np.concatenate([values.view(np.uint8), indices.view(np.uint8)])
        _clear(flat, chosen, group)
        totals = [_zeros(group, index) for index in range(len(arrays))]
        ends = np.cumsum([len(part) for part in chosen])
        factor = 1 / engine.size if group.op is Op.AVERAGE else 1.0
        # One rank after another: the sum has the same bits everywhere, and the indices of one rank are all
        # different.
        for part in engine.allgather(packed).reshape(engine.size, -1):
            theirs = part[: values.nbytes].view(dtype) * dtype.type(factor)
            places = part[values.nbytes :].view(indices.dtype)
            for total, start, end in zip(totals, [0, *ends], ends, strict=False):
                total.reshape(-1)[places[start:end]] += theirs[start:end]
        return group.with_arrays(as_given(totals, group), arrays if group.wants_errors else ())


@dataclass(frozen=True)
class RandomK(Scheme):
    """Sends random elements of each gradient, in each step others, the same on all ranks.

    There are no indices to send, and the values are summed as in a ring: 2 (size - 1) / size * ratio * 4 bytes per
    float32 element (Stich et al. 2018, arXiv:1809.07599).

    Args:
        ratio: The part of the elements that is sent, in (0, 1].
        rescale: Whether what is sent is divided by `ratio`, so that it is the gradient on average. Without error
            feedback learning needs this; with it, it would be wrong.
    """

    ratio: float
    rescale: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def reduce(self, group: Group, engine: Engine, state: State) -> Group:
        """Reduce the chosen elements."""
        if group.wants_errors and self.rescale:
            raise ValueError(
                f"{self!r}: with error feedback what is sent must not be rescaled. Pass rescale=False, or leave "
                "out ErrorFeedback."
            )
        arrays = group.writable() if group.wants_errors else group.arrays
        flat = [array.reshape(-1) for array in arrays]
        chosen = [
            _random(array.size, _count(self.ratio, array.size), key, state.count(f"draws/{key}"))
            for key, array in zip(group.keys, flat, strict=True)
        ]
        if group.call:
            engine.agree(group.call)
        # Ranks that are at different draws would add up different elements.
        draws = Call("random elements", tuple(str(state.shared[f"count/draws/{key}"]) for key in group.keys))
        sent = [array[indices] for array, indices in zip(flat, chosen, strict=True)]
        reduced = engine.grouped_allreduce(sent, group.op, draws, [True] * len(sent))
        _clear(flat, chosen, group)
        totals = [_zeros(group, index) for index in range(len(arrays))]
        for total, indices, values in zip(totals, chosen, reduced, strict=True):
            total.reshape(-1)[indices] = values * values.dtype.type(
                total.size / len(indices) if self.rescale and len(indices) else 1
            )
        return group.with_arrays(as_given(totals, group), arrays if group.wants_errors else ())


def largest(flat: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` elements of largest magnitude, in order; NaN is larger than any number."""
    candidates = None
    if len(flat) > 4 * _SAMPLE and count < len(flat) // 4:
        candidates = _candidates(flat, count)
    magnitudes = np.abs(flat if candidates is None else flat[candidates])
    chosen = np.argpartition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count :]
    if candidates is not None:
        chosen = candidates[chosen]
    return np.sort(chosen).astype(np.int32 if len(flat) < 1 << 31 else np.int64)


def _candidates(flat: np.ndarray, count: int) -> np.ndarray | None:
    """Return indices among which are the `count` largest, or None: a threshold is estimated from some elements.

    Sorting them all takes ten times as long as this, of which the idea is from Lin et al. 2018 (arXiv:1712.01887).
    """
    sample = np.abs(flat[:: len(flat) // _SAMPLE])
    expected = len(sample) * count / len(flat)
    position = math.ceil(expected + 4 * math.sqrt(expected) + 4)
    threshold = np.partition(sample, len(sample) - position)[len(sample) - position]
    found = [np.flatnonzero(~(np.abs(flat[piece]) < threshold)) + piece.start for piece in pieces(len(flat))]
    candidates = np.concatenate(found)  # also NaN
    return candidates if count <= len(candidates) < len(flat) // 2 else None


def _clear(flat: Sequence[np.ndarray], chosen: Sequence[np.ndarray], group: Group) -> None:
    """Leave in arrays what is not sent, if that is wanted."""
    if group.wants_errors:
        for array, indices in zip(flat, chosen, strict=True):
            array[indices] = 0


def _zeros(group: Group, index: int) -> np.ndarray:
    result = group.result(index, carrier(group.arrays[index].dtype, Op.SUM))
    result[...] = 0
    return result


def _random(size: int, count: int, key: str, draw: int) -> np.ndarray:
    if not size:
        return np.empty(0, np.int64)
    generator = np.random.default_rng([zlib.crc32(key.encode()), draw])
    return np.sort(generator.choice(size, count, replace=False, shuffle=False))


def _count(ratio: float, size: int) -> int:
    return min(max(1, round(ratio * size)), size)
