"""Send each element of a gradient in 8, 4 or 1 bits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hvdtrain.collectives.engine import Engine, Op
from hvdtrain.collectives.ops import carrier
from hvdtrain.collectives.reduction import rows_of_ranks
from hvdtrain.gradients.compression.checks import check_integer
from hvdtrain.gradients.compression.pieces import PIECE, as_given
from hvdtrain.gradients.schemes import Group, Scheme, State

_SCALE = 4  # bytes of the float32 before the codes of a block


@dataclass(frozen=True)
class Quantized(Scheme):
    """Rounds elements to a few bits, with one float32 scale for each block of a gradient.

    With 8 and 4 bits an element is a multiple of the block's largest magnitude / 127 or 7. With 1 bit it is its
    sign times the block's mean magnitude, as in signSGD with a majority vote (Bernstein et al. 2018,
    arXiv:1810.05291) whose votes are weighted with the ranks' mean magnitudes.

    Sums neither overflow nor drift: each rank gets the codes of its part from all ranks, adds up the decoded
    values in float32 (or float64, for such gradients), rounds the sum to a few bits again, once, and all ranks
    gather these codes and decode the same bytes. A rank sends and receives 2 (size - 1) / size * bits bits per
    element, as in a ring. The second rounding is in the errors of the rank that made it (Tang et al. 2019,
    arXiv:1905.05957).

    Args:
        bits: 8, 4 or 1.
        block: Number of elements with a scale of their own, a multiple of 32.
    """

    bits: int
    block: int = 1024

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, 1):
            raise ValueError(f"bits must be 8, 4 or 1. Received: bits={self.bits!r}.")
        check_integer("block", self.block, 32)
        if self.block % 32:
            raise ValueError(f"block must be a multiple of 32. Received: block={self.block}.")

    def reduce(self, group: Group, engine: Engine, state: State) -> Group:
        """Exchange codes, sum decoded values, and gather the codes of the sums."""
        if group.call:
            engine.agree(group.call)
        dtype = np.result_type(*(carrier(array.dtype, Op.SUM) for array in group.arrays))
        arrays = group.writable() if group.wants_errors else list(group.arrays)
        flat = [array.reshape(-1) for array in arrays]
        starts = np.cumsum([0, *(-(-array.size // self.block) for array in flat)])
        blocks, width = int(starts[-1]), self._row_bytes
        filled = np.full(blocks, self.block)  # elements of each block
        codes = state.scratch("codes", blocks * width, np.uint8).reshape(blocks, width)
        with np.errstate(invalid="ignore"):  # a NaN makes the scale, and so the whole block, NaN
            for array, start, end in zip(flat, starts, starts[1:], strict=False):
                filled[start:end][-1:] = array.size - (end - start - 1) * self.block
                errors = array if group.wants_errors else None
                self._encode(array, codes[start:end], filled[start:end], errors)
            rows = rows_of_ranks(blocks, engine.size)
            first, count = sum(rows[: engine.rank]), rows[engine.rank]
            received, _ = engine.alltoall(codes, rows)
            total = state.scratch("total", count * self.block, dtype)
            total[:] = 0
            for of_rank in received.reshape(engine.size, count, width):
                self._decode(of_rank, total, add=True)
            _clear_padding(total, filled[first:], self.block)
            mine = codes[:count]
            self._encode(total, mine, filled[first:], total)
            if group.wants_errors:  # what is left of the total is the error of this rank
                _add(total, first * self.block, flat, starts * self.block)
            codes = engine.allgather(mine)
            factor = 1 / engine.size if group.op is Op.AVERAGE else 1
            results = [
                group.result(index, carrier(array.dtype, Op.SUM)) for index, array in enumerate(group.arrays)
            ]
            for result, start, end in zip(results, starts, starts[1:], strict=False):
                self._decode(codes[start:end], result.reshape(-1), factor)
        return group.with_arrays(as_given(results, group), arrays if group.wants_errors else ())

    @property
    def _row_bytes(self) -> int:
        """Bytes of an encoded block: its scale and its codes."""
        return _SCALE + self.block * self.bits // 8

    def _encode(
        self, flat: np.ndarray, rows: np.ndarray, filled: np.ndarray, errors: np.ndarray | None
    ) -> None:
        """Encode an array.

        Args:
            flat: The array, which may end within its last block.
            rows: The result, one row for each block.
            filled: Number of elements in each block that are not padding.
            errors: Where to write what the codes lack; may be `flat`.
        """
        step = max(PIECE // self.block, 1)
        for row in range(0, len(rows), step):
            out = rows[row : row + step]
            values = flat[row * self.block : (row + step) * self.block]
            blocks = _padded(values, len(out) * self.block).reshape(len(out), self.block)
            if self.bits == 1:
                sums = np.abs(blocks).sum(axis=1, dtype=np.float64)
                scale = (sums / filled[row : row + len(out)]).astype(np.float32)
                out[:, _SCALE:] = np.packbits(blocks >= 0, axis=1)
            else:
                scale = self._rounded(blocks, out[:, _SCALE:])
            out[:, :_SCALE] = scale.view(np.uint8).reshape(-1, _SCALE)
            if errors is not None:
                sent = self._values(out, flat.dtype, 1)[: len(values)]
                np.subtract(values, sent, out=errors[row * self.block : (row + step) * self.block])

    def _rounded(self, blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Write the codes of 8 or 4 bits into `codes`; return the scales."""
        most = 127 if self.bits == 8 else 7
        peak = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))
        scale = (peak / most).astype(np.float32)
        # Of a scale so small that its inverse overflows, all codes are 0.
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > np.finfo(np.float32).tiny)
        multiples = blocks * inverse[:, None].astype(blocks.dtype)
        np.rint(multiples, out=multiples)
        if self.bits == 8:
            codes.view(np.int8)[...] = multiples
        else:
            halves = (multiples + 8).astype(np.uint8)
            codes[...] = halves[:, ::2] << 4 | halves[:, 1::2]
        return scale

    def _decode(self, rows: np.ndarray, out: np.ndarray, factor: float = 1, add: bool = False) -> None:
        """Write the values of encoded blocks, times a factor, to a flat array, or add them to it."""
        step = max(PIECE // self.block, 1)
        for row in range(0, len(rows), step):
            part = out[row * self.block : (row + step) * self.block]
            values = self._values(rows[row : row + step], out.dtype, factor)[: len(part)]
            if add:
                part += values
            else:
                part[:] = values

    def _values(self, rows: np.ndarray, dtype: np.dtype, factor: float) -> np.ndarray:
        """Return the values of encoded blocks, times a factor, as one flat array."""
        scale = rows[:, :_SCALE].copy().view(np.float32).astype(dtype) * dtype.type(factor)
        codes = rows[:, _SCALE:]
        values = np.empty((len(rows), self.block), dtype)
        if self.bits == 8:
            np.multiply(codes.view(np.int8), scale, out=values)
        elif self.bits == 4:
            np.multiply((codes >> 4).view(np.int8) - np.int8(8), scale, out=values[:, ::2])
            np.multiply((codes & 15).view(np.int8) - np.int8(8), scale, out=values[:, 1::2])
        else:
            signs = np.unpackbits(codes, axis=1).view(np.int8)
            np.multiply(2 * signs - np.int8(1), scale, out=values)
        return values.reshape(-1)


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """Return an array of floats of at least 32 bits, with zeros at its end if it is shorter than `size`."""
    values = values.astype(carrier(values.dtype, Op.SUM), copy=False)
    if len(values) == size:
        return values
    return np.concatenate([values, np.zeros(size - len(values), values.dtype)])


def _clear_padding(total: np.ndarray, filled: np.ndarray, block: int) -> None:
    """Set the padding of blocks to zero; `filled` is the number of elements of each block."""
    for row in np.flatnonzero(filled[: len(total) // block] < block):
        total[row * block + filled[row] : (row + 1) * block] = 0


def _add(total: np.ndarray, offset: int, arrays: Sequence[np.ndarray], starts: np.ndarray) -> None:
    """Add one rank's part of the sum to flat arrays.

    Args:
        total: Values from element `offset` of all padded arrays, one after the other.
        offset: See `total`.
        arrays: The arrays without padding.
        starts: Where each begins in all padded arrays.
    """
    for array, start in zip(arrays, starts, strict=False):
        first, last = max(start, offset), min(start + len(array), offset + len(total))
        if first < last:
            array[first - start : last - start] += total[first - offset : last - offset]
