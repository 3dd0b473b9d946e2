"""Send the gradient of a matrix as a product of two thin ones: PowerSGD."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hvdtrain.collectives.engine import Call, Engine, Op
from hvdtrain.collectives.ops import carrier
from hvdtrain.gradients.compression.checks import check_integer
from hvdtrain.gradients.compression.composition import reduce_some
from hvdtrain.gradients.compression.pieces import PIECE, as_given, subtract
from hvdtrain.gradients.schemes import Group, Scheme, State


@dataclass(frozen=True)
class PowerSGD(Scheme):
    """Approximates each matrix by one step of a power iteration (Vogels et al. 2019, arXiv:1905.13727).

    A gradient of shape (a, b, c, d) is the matrix M of shape (n, m) = (a*b*c, d). With Q of shape (m, rank), the
    ranks reduce P = M Q, make its columns orthonormal, reduce Q = M^T P, and apply P Q^T: (n + m) * rank numbers
    in place of n * m. Gradients for which that is no less, and those with one dimension, are sent as they are.

    Args:
        rank: Number of columns of P and Q.
        warm_start: Whether a step starts from the Q of the one before; otherwise from random numbers.
    """

    rank: int
    warm_start: bool = True

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)

    def check(self, shapes: Sequence[tuple[int | None, ...]]) -> None:
        """Raise ValueError if no gradient would be compressed."""
        if not any(None in shape or self._pays(_matrix_shape(shape)) for shape in shapes):
            raise ValueError(
                f"{self!r} compresses matrices of which (rows + columns) * rank is less than rows * columns, and "
                f"none of the gradients is one. Received: {_shown(shapes)}. "
                "Choose another compression, or none."
            )

    def reduce(self, group: Group, engine: Engine, state: State) -> Group:
        """Reduce the two thin matrices of each gradient, one after the other."""
        pays = [self._pays(_matrix_shape(array.shape)) for array in group.arrays]
        if not all(pays):
            return reduce_some(self, pays, group, engine, state)
        matrices = [
            array.reshape(_matrix_shape(array.shape)).astype(carrier(array.dtype, Op.SUM), copy=False)
            for array in (group.writable() if group.wants_errors else group.arrays)
        ]
        right = [self._start(key, matrix, state) for key, matrix in zip(group.keys, matrices, strict=True)]
        left = _reduced(engine, [m @ q for m, q in zip(matrices, right, strict=True)], group.op, group.call)
        left = _orthonormal(left, engine)
        right = _reduced(engine, [m.T @ p for m, p in zip(matrices, left, strict=True)], group.op)
        for key, q in zip(group.keys, right, strict=True):
            state.shared.pop(_name(key), None)
            if self.warm_start and np.isfinite(q).all():
                state.shared[_name(key)] = q.copy()
        results = [group.result(index, matrix.dtype) for index, matrix in enumerate(matrices)]
        for result, p, q in zip(results, left, right, strict=True):
            _multiply(p, q, result.reshape(len(p), len(q)))
        if not group.wants_errors:
            return group.with_arrays(as_given(results, group))
        share = 1 / engine.size if group.op is Op.SUM else 1.0
        for matrix, result in zip(matrices, results, strict=True):
            subtract(matrix.reshape(-1), result.reshape(-1), share)
        errors = [matrix.reshape(array.shape) for matrix, array in zip(matrices, group.arrays, strict=True)]
        return group.with_arrays(as_given(results, group), errors)

    def _pays(self, shape: tuple[int, int]) -> bool:
        rows, columns = shape
        return (rows + columns) * self.rank < rows * columns

    def _start(self, key: str, matrix: np.ndarray, state: State) -> np.ndarray:
        """Return the Q from which the step starts, the same on all ranks."""
        stored = state.shared.get(_name(key))
        if stored is not None and stored.shape == (matrix.shape[1], self.rank):
            return stored
        draw = 0 if self.warm_start else state.count(f"draws/{key}")
        generator = np.random.default_rng([zlib.crc32(key.encode()), draw])
        return generator.standard_normal((matrix.shape[1], self.rank)).astype(matrix.dtype)


def _orthonormal(matrices: list[np.ndarray], engine: Engine) -> list[np.ndarray]:
    """Return matrices with the same span and orthonormal columns, the same bits on all ranks.

    Each rank computes some of them, and all gather the results: LAPACK rounds differently on different CPUs.
    """
    mine = [np.linalg.qr(matrix)[0] for matrix in matrices[engine.rank :: engine.size]]
    packed = [np.ascontiguousarray(matrix).reshape(-1).view(np.uint8) for matrix in mine]
    gathered = engine.allgather(np.concatenate([np.empty(0, np.uint8), *packed]))
    results: list[np.ndarray] = [*matrices]
    start = 0
    for rank in range(engine.size):
        for index in range(rank, len(matrices), engine.size):
            end = start + matrices[index].nbytes
            results[index] = (
                gathered[start:end].copy().view(matrices[index].dtype).reshape(matrices[index].shape)
            )
            start = end
    return results


def _multiply(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
    """Compute left @ right.T by additions in a fixed order, the same bits on all ranks, unlike that of BLAS."""
    columns = np.ascontiguousarray(right.T)
    step = max(PIECE // max(len(right), 1), 1)
    for start in range(0, len(left), step):
        piece, rows = out[start : start + step], left[start : start + step]
        np.multiply(rows[:, :1], columns[0], out=piece)
        for index in range(1, len(columns)):
            piece += rows[:, index, None] * columns[index]


def _name(key: str) -> str:
    return f"powersgd/{key}"


def _matrix_shape(shape: Sequence[int | None]) -> tuple[int, int]:
    """Return rows and columns of a gradient as a matrix; one with fewer than two dimensions has one row."""
    *rows, columns = shape or (1,)
    return math.prod(rows), columns  # type: ignore[arg-type,return-value]


def _reduced(engine: Engine, arrays: list[np.ndarray], op: Op, call: Call | None = None) -> list[np.ndarray]:
    return engine.grouped_allreduce(arrays, op, call, [True] * len(arrays))


def _shown(shapes: Sequence[tuple[int | None, ...]]) -> str:
    return f"gradients of shape {', '.join(map(str, shapes))}" if shapes else "small gradients only"
