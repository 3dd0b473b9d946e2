"""Process sets: collectives of some ranks, beside each other and overlapping."""

import numpy as np
import pytest

from hvdtrain import runtime
from hvdtrain.collectives.engine import MismatchError
from hvdtrain.runtime import process_sets
from hvdtrain.runtime.process_sets import (
    ProcessSet,
    add_process_set,
    engine_of,
    global_process_set,
    remove_process_set,
)

pytestmark = pytest.mark.ranks


@pytest.fixture
def added(engine):
    """Adds sets on all ranks, and takes them away again."""
    sets = []

    def add(ranks):
        sets.append(add_process_set(ranks))
        return sets[-1]

    yield add
    for each in sets:
        remove_process_set(each)


def test_the_global_set(engine):
    assert global_process_set.process_set_id == 0
    assert global_process_set.ranks == list(range(engine.size))
    assert (global_process_set.size(), global_process_set.rank()) == (engine.size, engine.rank)
    assert global_process_set.included() and engine_of(global_process_set) is engine_of() is engine
    assert not remove_process_set(global_process_set)


def test_even_and_odd_ranks_work_beside_each_other(engine, added):
    if engine.size < 2:
        pytest.skip("needs two ranks")
    even, odd = added(range(0, engine.size, 2)), added(range(1, engine.size, 2))
    mine, other = (even, odd) if engine.rank % 2 == 0 else (odd, even)
    assert mine.included() and not other.included() and other.rank() is None
    assert mine.ranks[mine.rank()] == engine.rank
    part = engine_of(mine)
    assert part.size == mine.size() == len(mine.ranks) and part.ranks == tuple(mine.ranks)
    for _ in range(1 + engine.rank % 2):  # the odd ranks reduce twice, and nobody waits for them
        np.testing.assert_array_equal(part.allreduce(np.array([engine.rank]), "sum"), [sum(mine.ranks)])
    np.testing.assert_array_equal(part.allgather(np.array([engine.rank])), mine.ranks)
    with pytest.raises(ValueError, match=rf"Rank {engine.rank} does not belong"):
        engine_of(other)


def test_a_root_is_a_rank_of_the_world(engine, added):
    if engine.size < 2:
        pytest.skip("needs two ranks")
    last = added([engine.size - 1])
    if last.included():
        part = engine_of(last)
        assert part.broadcast(np.array([7]), engine.size - 1)[0] == 7
        assert part.broadcast_object("seven", engine.size - 1) == "seven"
        with pytest.raises(ValueError, match="takes part: rank"):
            part.broadcast(np.array([7]), 0)


def test_overlapping_sets(engine, added):
    if engine.size < 4:
        pytest.skip("needs four ranks")
    sets = [added([0, 1, 2]), added([1, 2, 3])]
    for each in sets:
        if each.included():
            total = engine_of(each).allreduce(np.array([float(engine.rank)]), "average")
            np.testing.assert_allclose(total, [np.mean(each.ranks)])


def test_a_mismatch_in_a_set_names_ranks_of_the_world(engine, added):
    if engine.size < 4:
        pytest.skip("needs four ranks")
    part = added([1, 3])
    if part.included():
        with pytest.raises(MismatchError, match=r"rank 1: .*\(2,\).*\n +rank 3: .*\(3,\)"):
            engine_of(part).allreduce(np.zeros(2 if engine.rank == 1 else 3))


def test_a_removed_set_is_of_no_use(engine, added):
    if engine.size < 2:
        pytest.skip("needs two ranks")
    part = add_process_set([0])
    again = ProcessSet(part.ranks)
    with pytest.raises(ValueError, match="exists already"):
        add_process_set(again)
    assert remove_process_set(part) and part.process_set_id is None and part.size() is None
    assert not remove_process_set(part)
    with pytest.raises(ValueError, match="is not in use"):
        engine_of(part)
    added([0])


@pytest.mark.parametrize("ranks", [[], [0, 0], [-1], [99]])
def test_ranks_that_are_none(engine, ranks):
    if engine.name == "single":
        pytest.skip("a world of one has no other sets")
    with pytest.raises(ValueError, match="different ranks of 0 to"):
        add_process_set(ranks)
    assert not runtime.engines_of_sets


def test_the_set_of_all_ranks_exists(engine):
    with pytest.raises(ValueError, match="exists already"):
        add_process_set(range(engine.size))


def test_ranks_that_add_different_sets_are_told(engine):
    if engine.size < 2:
        pytest.skip("needs two ranks")
    with pytest.raises(MismatchError, match=r"rank 0: \[\[0\]\]; rank 1: \[\[1\]\]"):
        add_process_set([min(engine.rank, 1)])


def test_sets_made_of_communicators(engine):
    if engine.size < 2:
        pytest.skip("needs two ranks")
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Split(engine.rank % 2, engine.rank)
    mine = ProcessSet(comm)
    process_sets.register([mine])
    assert mine.ranks == [rank for rank in range(engine.size) if rank % 2 == engine.rank % 2]
    total = engine_of(mine).allreduce(np.array([engine.rank]), "sum")
    assert total[0] == sum(mine.ranks)
    numbers = engine.allgather_object(mine.process_set_id)
    assert numbers[0] != numbers[1]
    # Each rank holds one of the two sets; all take both away together.
    for number in sorted(set(numbers)):
        held = mine if mine.process_set_id == number else ProcessSet([])
        held.process_set_id = number
        assert remove_process_set(held)
    comm.Free()
