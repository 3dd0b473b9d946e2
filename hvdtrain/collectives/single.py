"""Run without other processes: every operation returns its input, and MPI is not loaded."""

from collections.abc import Sequence

import numpy as np

from hvdtrain.collectives.engine import Engine, Op, World


class SingleEngine(Engine):
    """A world of one rank, so that a script runs unchanged without a launcher."""

    name = "single"
    library = "no MPI"

    def __init__(self) -> None:
        self.world = World()

    def _compared(self, number: int, value: int = 0) -> tuple[bool, int]:
        return True, value

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
        """Do nothing: a world of one has no resources to free."""

    def abort(self, code: int) -> None:
        """Do nothing: the calling process is the only one, and it is already ending."""
