"""One process: every operation is its own result, and MPI is never touched."""

from collections.abc import Sequence

import numpy as np

from hvdtrain.collectives.engine import Engine, Op, World


class SingleEngine(Engine):
    """A world of one. Costs nothing and needs nothing, so a script runs unchanged without a launcher."""

    name = "single"
    library = "no MPI"

    def __init__(self) -> None:
        self.world = World()

    def _compared(self, number: int, wish: int = 0) -> tuple[bool, int]:
        return True, wish

    def _reduce(self, send: np.ndarray, receive: np.ndarray, op: Op) -> None:
        if receive is not send:
            receive[...] = send

    def _gather(self, array: np.ndarray) -> tuple[np.ndarray, list[int]]:
        return array.copy(), [len(array)]

    def _broadcast(self, array: np.ndarray, root_rank: int) -> np.ndarray:
        return array.copy()

    def _reduce_scatter(self, array: np.ndarray, rows: Sequence[int], op: Op) -> np.ndarray:
        return array.copy()

    def _exchange(self, array: np.ndarray, splits: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        return array.copy(), list(splits)

    def _subset(self, ranks: Sequence[int]) -> "SingleEngine":
        return SingleEngine()

    def shutdown(self) -> None:
        """Do nothing: a world of one holds nothing."""

    def abort(self, code: int) -> None:
        """Do nothing: the process that asks is the only one, and is ending already."""
