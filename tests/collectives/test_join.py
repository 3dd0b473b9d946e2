"""join: ranks with fewer batches let the others finish."""

import numpy as np
import pytest

from hvdtrain.collectives.engine import MismatchError

pytestmark = pytest.mark.ranks


def test_sums_go_on_without_those_that_joined(engine):
    results = [engine.allreduce(np.full(3, engine.rank + 1.0), "sum") for _ in range(engine.rank + 1)]
    last = engine.join()
    assert last == engine.size - 1
    for step, result in enumerate(results):
        np.testing.assert_array_equal(result, np.full(3, sum(range(step + 1, engine.size + 1))))


def test_a_mean_divides_by_all_ranks(engine):
    if engine.rank != 0:
        mean = engine.allreduce(np.array([float(engine.size)]))
        np.testing.assert_allclose(mean, engine.size - 1)
    joined = engine.join()
    assert joined == engine.size - 1


def test_groups_gathers_and_objects_go_on(engine):
    if engine.rank != 0:
        small, large = engine.grouped_allreduce([np.ones(5), np.ones((300, 400), np.float32)], "sum")
        assert small[0] == large[0, 0] == engine.size - 1
        rows = engine.allgather(np.full((2, 3), engine.rank))
        np.testing.assert_array_equal(rows[:, 0], np.repeat(range(1, engine.size), 2))
        assert engine.allgather_object(engine.rank) == [None, *range(1, engine.size)]
        engine.barrier()
    engine.join()
    assert engine.allreduce(np.array([1]), "sum")[0] == engine.size


@pytest.mark.parametrize(
    "operate",
    [
        lambda engine: engine.broadcast(np.zeros(1), 1),
        lambda engine: engine.allreduce(np.ones(1), "max"),
        lambda engine: engine.reducescatter(np.ones(engine.size)),
    ],
)
def test_what_needs_all_ranks_is_refused_on_all(engine, operate):
    if engine.size < 2:
        pytest.skip("needs two ranks")
    with pytest.raises(MismatchError, match="join"):
        engine.join() if engine.rank == 0 else operate(engine)


def test_ranks_that_part_are_told_while_one_has_joined(engine):
    if engine.size < 3:
        pytest.skip("needs three ranks")
    with pytest.raises(MismatchError, match="do not agree"):
        engine.join() if engine.rank == 0 else engine.allreduce(np.ones(engine.rank), "sum")


def test_all_at_once(engine):
    assert engine.join() == engine.size - 1
    assert engine.join() == engine.size - 1
