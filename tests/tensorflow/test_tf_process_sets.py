"""Every operation on some of the ranks, without the others: disjoint sets at once, and overlapping ones."""

import numpy as np
import pytest
import tensorflow as tf
from modes import gradient

import hvdtrain.tensorflow as hvd

pytestmark = pytest.mark.ranks


@pytest.fixture
def mine(halves):
    return halves[0]


def of(ranks):
    return np.float32([rank + 1 for rank in ranks])


def test_operations_of_two_halves_at_once(run, mine):
    ranks, value = mine.ranks, np.float32([hvd.rank() + 1.0])
    size, place = len(ranks), ranks.index(hvd.rank())

    def everything(tensor):
        options = {"process_set": mine}
        rows = tf.tile(tensor, [size])
        return [
            hvd.allreduce(tensor, **options),
            hvd.allreduce(tensor, op=hvd.Sum, prescale_factor=2.0, **options),
            hvd.grouped_allreduce([tensor, tensor * 2], op=hvd.Max, **options)[1],
            hvd.allgather(tensor, **options),
            hvd.grouped_allgather([tensor, tensor * 2], **options)[1],
            hvd.broadcast(tensor, ranks[-1], **options),
            hvd.alltoall(rows, **options),
            hvd.alltoall(rows, tf.ones([size], tf.int32), **options)[1],
            hvd.reducescatter(rows * tf.range(1.0, size + 1), **options),
            hvd.grouped_reducescatter([rows], op=hvd.Sum, process_set=mine)[0],
        ]

    expected = [
        [of(ranks).mean()],
        [2 * of(ranks).sum()],
        [2 * of(ranks).max()],
        of(ranks),
        2 * of(ranks),
        [ranks[-1] + 1],
        of(ranks),
        np.ones(size),
        [of(ranks).mean() * (place + 1)],
        [of(ranks).sum()],
    ]
    for result, right in zip(run(everything, value), expected, strict=True):
        np.testing.assert_allclose(result, right, rtol=1e-6)


def test_gradients_stay_within_the_set(run, mine):
    ranks, upstream = mine.ranks, np.float32([hvd.rank() + 1.0])
    size = len(ranks)

    def back(tensor, upstream):
        options = {"process_set": mine}
        wide = tf.tile(upstream, [size])
        return [
            *gradient(lambda each: hvd.allreduce(each, op=hvd.Sum, **options), tensor, upstream=upstream),
            *gradient(lambda each: hvd.allgather(each, **options), tensor, upstream=wide),
            *gradient(lambda each: hvd.broadcast(each, ranks[0], **options), tensor, upstream=upstream),
            *gradient(lambda each: hvd.alltoall(tf.tile(each, [size]), **options), tensor, upstream=wide),
            *gradient(
                lambda each: hvd.reducescatter(tf.tile(each, [size]), op=hvd.Sum, **options),
                tensor,
                upstream=upstream,
            ),
        ]

    expected = [
        of(ranks).sum(),
        of(ranks).mean(),
        of(ranks).mean() if hvd.rank() == ranks[0] else 0,
        of(ranks).sum(),
        of(ranks).sum() * size,
    ]
    for result, right in zip(run(back, np.float32([1.0]), upstream), expected, strict=True):
        np.testing.assert_allclose(result, [right], rtol=1e-6)


def test_one_half_may_do_more_than_the_other(mine):
    for _ in range(1 + hvd.rank() % 2):
        assert hvd.allreduce(float(hvd.rank()), op=hvd.Sum, process_set=mine) == sum(mine.ranks)
    hvd.barrier(process_set=mine)
    assert hvd.allreduce(1.0, op=hvd.Sum) == hvd.size()


def test_sets_that_overlap(overlapping):
    for process_set in overlapping:
        gathered = hvd.allgather(tf.constant([hvd.rank()]), process_set=process_set)
        np.testing.assert_array_equal(gathered, process_set.ranks)


def test_variables_and_objects(mine):
    root_rank = mine.ranks[-1]
    variable = tf.Variable([float(hvd.rank())])
    hvd.broadcast_variables([variable], root_rank, process_set=mine)
    np.testing.assert_array_equal(variable, [root_rank])
    variable.assign([float(hvd.rank())])
    (value,) = hvd.broadcast_([variable], root_rank, process_set=mine)
    np.testing.assert_array_equal(value, [root_rank])
    assert hvd.broadcast_object({"rank": hvd.rank()}, root_rank, process_set=mine) == {"rank": root_rank}
    assert hvd.broadcast_object_fn(root_rank, process_set=mine)(hvd.rank()) == root_rank
    assert hvd.allgather_object(hvd.rank(), process_set=mine) == mine.ranks


def test_where_i_am_in_a_set(run, halves):
    mine, other = halves
    number = mine.process_set_id
    assert run(lambda: hvd.size_op(number)) == len(mine.ranks)
    assert run(lambda: hvd.process_set_included_op(process_set_id=number)) == 1
    if other is not None:
        assert run(lambda: hvd.process_set_included_op(other.process_set_id)) == 0
        assert run(lambda: hvd.size_op(process_set_id=other.process_set_id)) == len(other.ranks)


def test_a_set_that_does_not_exist(run):
    assert run(lambda: hvd.process_set_included_op(12345)) == -3


def test_a_tape_of_one_half_and_of_none(halves):
    mine, other = halves
    variable = tf.Variable([1.0])

    def of_set(process_set):
        with tf.GradientTape() as tape:
            loss = (hvd.rank() + 1.0) * tf.reduce_sum(variable)
        return hvd.DistributedGradientTape(tape, process_set=process_set).gradient(loss, [variable])[0]

    np.testing.assert_allclose(of_set(mine), [of(mine.ranks).mean()], rtol=1e-6)
    if other is not None:  # no member: its gradient stays its own, and nobody waits for it
        np.testing.assert_allclose(of_set(other), [hvd.rank() + 1.0])
