"""Define process sets: groups of ranks that run collectives and whole trainings without the others."""

from collections.abc import Sequence
from typing import Any

from hvdtrain import runtime
from hvdtrain.collectives.engine import Engine, MismatchError
from hvdtrain.collectives.single import SingleEngine


class ProcessSet:
    """Some ranks that average gradients, gather and broadcast without waiting for the others.

    Give it to `hvd.init(process_sets=[...])` or `hvd.add_process_set(...)` on all ranks, then pass it as
    `process_set=` to each function that communicates. Sets may overlap. All ranks, including a root_rank, are
    numbered as in the whole world. The API is Horovod's (https://horovod.readthedocs.io/en/stable/process_set.html).

    Args:
        ranks_or_comm: Ranks of the world, or an mpi4py communicator; each rank passes its own.
    """

    process_set_id: int | None = None
    mpi_comm: Any = None

    def __init__(self, ranks_or_comm: Any) -> None:
        if hasattr(ranks_or_comm, "Get_group"):
            self.mpi_comm, self._ranks = ranks_or_comm, None
        else:
            self._ranks = sorted(int(rank) for rank in ranks_or_comm)

    @property
    def ranks(self) -> list[int] | None:
        """The ranks of the world that belong to this set; None if they are not known yet."""
        if self.process_set_id == 0:
            return list(range(runtime.engine().size)) if runtime.is_initialized() else None
        return self._ranks

    @ranks.setter
    def ranks(self, ranks: Sequence[int] | None) -> None:
        self._ranks = list(ranks) if ranks is not None else None

    def size(self) -> int | None:
        """Return the number of ranks in this set, or None if it is not in use."""
        return len(self.ranks or ()) if self._in_use() else None

    def rank(self) -> int | None:
        """Return the rank of this process within the set; None if it is not a member or the set is not in use."""
        return (self.ranks or []).index(runtime.engine().rank) if self.included() else None

    def included(self) -> bool | None:
        """Return whether this process belongs to the set; None if the set is not in use."""
        return runtime.engine().rank in (self.ranks or ()) if self._in_use() else None

    def _in_use(self) -> bool:
        known = runtime.engines_of_sets.get(self.process_set_id or 0, (None,))[0]
        return runtime.is_initialized() and (self.process_set_id == 0 or known == tuple(self._ranks or ()))

    def __str__(self) -> str:
        return (
            f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks}, mpi_comm={self.mpi_comm})"
        )

    __repr__ = __str__


global_process_set = ProcessSet([])
global_process_set.process_set_id = 0


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Make a process set usable. All ranks of the world call this, members or not.

    Args:
        process_set: The set, or its ranks.

    Returns:
        The set, with its `process_set_id`.

    Raises:
        ValueError: If the ranks are not in this world, a set of the same ranks exists, or `hvd.init()` was not
            called.
        MismatchError: On every rank, if the ranks do not pass the same set.
    """
    added = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    register([added])
    return added


def remove_process_set(process_set: ProcessSet) -> bool:
    """Remove a process set. All ranks of the world call this.

    Args:
        process_set: A set that was added.

    Returns:
        True, or False if the set is the global one or not in use.
    """
    number = process_set.process_set_id
    runtime.engine()
    if not number or number not in runtime.engines_of_sets:
        return False
    runtime.engine().barrier()
    _, engine = runtime.engines_of_sets.pop(number)
    if engine is not None:
        engine.closed = True
        engine.shutdown()
    process_set.process_set_id = None
    return True


def register(sets: Sequence[ProcessSet]) -> None:
    """Make process sets usable, from `hvd.init` or later; all ranks of the world call this.

    Args:
        sets: The sets. Only sets of communicators may differ between ranks.
    """
    world = runtime.engine()
    for process_set in sets:
        if not isinstance(process_set, ProcessSet):
            raise TypeError(
                "A process set is made by hvd.ProcessSet([0, 1]). "
                f"Received: {process_set!r}, a {type(process_set).__name__}."
            )
    wanted = [_ranks_of(process_set, world) for process_set in sets]
    wanted_everywhere = world.allgather_object(wanted)
    from_communicators = any(
        world.allgather_object(any(process_set.mpi_comm is not None for process_set in sets))
    )
    if not from_communicators and any(ranks != wanted_everywhere[0] for ranks in wanted_everywhere):
        received = "; ".join(
            f"rank {rank}: {[list(ranks) for ranks in wanted_there]}"
            for rank, wanted_there in enumerate(wanted_everywhere)
        )
        raise MismatchError(
            f"All ranks must add the same process sets, members or not. Received on {received}."
        )
    _reject_duplicates(wanted, world)
    distinct = dict.fromkeys(ranks for wanted_there in wanted_everywhere for ranks in wanted_there)
    numbers = {ranks: _open(ranks, world) for ranks in distinct}
    for process_set, ranks in zip(sets, wanted, strict=True):
        process_set.process_set_id, process_set.ranks = numbers[ranks], ranks


def engine_of(process_set: ProcessSet | None = None) -> Engine:
    """Return the engine of a process set.

    Args:
        process_set: The set; None for the whole world.

    Raises:
        ValueError: If the set is not in use, or this rank does not belong to it.
    """
    world = runtime.engine()
    if process_set is None or process_set.process_set_id == 0:
        return world
    if process_set.included() is None:
        raise ValueError(
            f"{process_set} is not in use. Add it on all ranks: hvd.init(process_sets=[...]) or "
            "hvd.add_process_set(...)."
        )
    _, engine = runtime.engines_of_sets[process_set.process_set_id or 0]
    if engine is None:
        raise ValueError(
            f"Rank {world.rank} does not belong to the process set of ranks {process_set.ranks}, so it cannot take "
            "part. Call this where process_set.included() is True."
        )
    return engine


def engine_or_alone(process_set: ProcessSet | None = None) -> Engine:
    """Return the engine of a process set, or that of a world of one rank if this rank is not a member."""
    outside = process_set is not None and process_set.included() is False
    return SingleEngine() if outside else engine_of(process_set)


def _ranks_of(process_set: ProcessSet, world: Engine) -> tuple[int, ...]:
    if process_set.mpi_comm is None:
        return tuple(process_set.ranks or ())
    # A communicator has its own numbering, so each process sends its rank in the world.
    return tuple(sorted(process_set.mpi_comm.allgather(world.rank)))


def _reject_duplicates(wanted: Sequence[tuple[int, ...]], world: Engine) -> None:
    known = [tuple(range(world.size)), *(ranks for ranks, _ in runtime.engines_of_sets.values())]
    for ranks in wanted:
        if ranks in known:
            raise ValueError(
                f"A process set of ranks {list(ranks)} exists already: use that one. (That of all ranks is "
                "hvd.global_process_set.)"
            )
        known.append(ranks)


def _open(ranks: tuple[int, ...], world: Engine) -> int:
    number = max(runtime.engines_of_sets, default=0) + 1
    runtime.engines_of_sets[number] = ranks, world.subset(ranks)
    return number
