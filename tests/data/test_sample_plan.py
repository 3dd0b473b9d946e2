"""Index arithmetic: every sample once, the same batches whatever the number of ranks is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.data.sample_plan import Plan, deal, permutation
from hvdtrain.data.shard import checked_batch_size


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 9), st.booleans(), st.integers(0, 3))
def test_every_sample_once_in_equal_steps(length, size, rows, shuffle, epoch):
    plans = [Plan(length, size * rows, rank, size, shuffle) for rank in range(size)]
    seen = []
    for plan in plans:
        assert plan.steps == -(-length // (size * rows))
        for step in range(plan.steps):
            indices, part = plan.part(plan.order(epoch), step)
            assert len(indices) == max(part.own, 1) and part.own <= rows
            seen += list(indices[: part.own])
    assert sorted(seen) == list(range(length))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100), st.sampled_from([2, 4, 8]), st.integers(0, 5))
def test_a_global_batch_is_the_same_on_any_number_of_ranks(length, size, epoch):
    alone = Plan(length, 16, 0, 1, True, seed=5)
    for step in range(alone.steps):
        everyone = set()
        for rank in range(size):
            plan = Plan(length, 16, rank, size, True, seed=5)
            indices, part = plan.part(plan.order(epoch), step)
            everyone |= set(indices[: part.own])
        assert everyone == set(alone.part(alone.order(epoch), step)[0])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_a_mean_over_ranks_of_weighted_means_is_the_mean_over_samples(size, count):
    values = np.random.default_rng(0).standard_normal(count)
    parts = [deal(count, rank, size) for rank in range(size)]
    means = [np.mean(values[rows.take]) * rows.weight for rows in parts]
    np.testing.assert_allclose(np.mean(means), values.mean(), rtol=1e-14)
    held = [rows.own for rows in parts]
    assert sum(held) == count and max(held) - min(held) <= 1


def test_what_is_dropped_is_less_than_a_batch():
    plan = Plan(23, 8, 1, 2, remainder="drop")
    assert plan.steps == 2 and not plan.partial
    with pytest.raises(ValueError, match="would drop everything: 7 samples do not fill one batch of 8"):
        Plan(7, 8, 0, 2, remainder="drop")
    with pytest.raises(ValueError, match="no samples"):
        Plan(0, 8, 0, 2)


def test_orders_depend_on_seed_and_epoch_alone():
    np.random.seed(0)
    first = permutation(50, 1, 2)
    np.random.seed(9)
    np.testing.assert_array_equal(first, permutation(50, 1, 2))
    assert not np.array_equal(first, permutation(50, 1, 3))
    assert not np.array_equal(first, permutation(50, 2, 2))
    # Fixed for good: a run that is resumed next year must find its order again.
    assert list(permutation(8, 0, 0)) == list(PHILOX)


PHILOX = (3, 6, 4, 0, 7, 5, 2, 1)


@pytest.mark.parametrize(
    ("batch_size", "error", "says"),
    [
        (None, ValueError, "batch_size is missing.*batch_size=128, which is 32 on each of the 4"),
        (30, ValueError, "must divide by the 4 ranks.*Nearest: 28 or 32"),
        (3, ValueError, "Nearest: 4"),
        (0, ValueError, "Nearest: 4"),
        (-8, ValueError, "Nearest: 4"),
        (-1, ValueError, "Nearest: 4"),
        (8.0, TypeError, "must be an integer"),
        (True, TypeError, "must be an integer"),
        ("8", TypeError, "must be an integer"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest(batch_size, error, says):
    with pytest.raises(error, match=says):
        checked_batch_size(batch_size, 4)
    assert checked_batch_size(np.int32(8), 4) == 8
