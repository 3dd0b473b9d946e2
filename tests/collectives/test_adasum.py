"""Adasum against NumPy, and what the paper says of the two ends of its scale."""

import numpy as np
import pytest

from hvdtrain.collectives.engine import Op

pytestmark = pytest.mark.ranks


def pair(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    product = (a * b).sum()
    return (1 - product / (2 * (a * a).sum())) * a + (1 - product / (2 * (b * b).sum())) * b


def tree(arrays):
    if len(arrays) == 1:
        return arrays[0]
    middle = len(arrays) // 2
    return pair(tree(arrays[:middle]), tree(arrays[middle:]))


def held_by(rank, shape):
    return np.random.default_rng(rank).standard_normal(shape)


@pytest.mark.parametrize("dtype, close", [("float64", 1e-12), ("float32", 1e-5), ("float16", 2e-3)])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (40, 30, 50)])
def test_the_tree_of_pairs(engine, dtype, close, shape):
    every = [held_by(rank, shape).astype(dtype) for rank in range(engine.size)]
    result = engine.allreduce(every[engine.rank], Op.ADASUM)
    assert result.dtype == dtype
    np.testing.assert_allclose(result, tree(every), rtol=close, atol=close)
    assert len(set(engine.allgather_object(result.tobytes()))) == 1


def test_each_array_of_a_group_by_itself(engine):
    every = [[held_by(rank, 4), held_by(rank + 100, (2, 3))] for rank in range(engine.size)]
    results = engine.grouped_allreduce(every[engine.rank], Op.ADASUM)
    for index, result in enumerate(results):
        np.testing.assert_allclose(result, tree([each[index] for each in every]), rtol=1e-12)


def test_equal_gradients_are_averaged_and_orthogonal_ones_added(engine):
    np.testing.assert_allclose(engine.allreduce(np.arange(1.0, 5), Op.ADASUM), np.arange(1.0, 5))
    mine = np.zeros(engine.size)
    mine[engine.rank] = 3.0
    np.testing.assert_allclose(engine.allreduce(mine, Op.ADASUM), np.full(engine.size, 3.0))


def test_zeros(engine):
    mine = np.full(3, 2.0 if engine.rank == 0 else 0.0)
    np.testing.assert_allclose(engine.allreduce(mine, Op.ADASUM), np.full(3, 2.0))


def test_integers_are_refused(engine):
    with pytest.raises(TypeError, match="needs floats"):
        engine.allreduce(np.arange(3), Op.ADASUM)


def test_a_number_of_ranks_that_is_no_power_of_two():
    from hvdtrain.collectives import adasum

    with pytest.raises(NotImplementedError, match=r"3 ranks\. Start 2 or 4"):
        adasum.combine(np.ones(2), 0, 3, lambda array, _: array)
