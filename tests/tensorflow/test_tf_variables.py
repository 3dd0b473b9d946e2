"""What makes variables and objects the same everywhere; where this process stands."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.tensorflow as hvd

pytestmark = pytest.mark.ranks


def my_variables():
    value = hvd.rank() + 1
    return [
        tf.Variable(np.full((2, 3), value, np.float32)),
        tf.Variable(value, dtype=tf.int64, trainable=False),
        keras.Variable(np.full(3, value, np.float32)),
        tf.Variable([value % 2 == 0, True]),
        tf.Variable(tf.cast([value], tf.bfloat16)),
    ]


def assert_of_rank(values, rank):
    expected = [np.full((2, 3), rank + 1), rank + 1, np.full(3, rank + 1), [rank % 2 == 1, True], [rank + 1]]
    for value, right in zip(values, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(tf.convert_to_tensor(value).numpy()), right)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "function"])
def test_broadcast_of_variables_of_all_kinds(inplace, wrap):
    for root_rank in range(hvd.size()):
        variables = my_variables()
        send = functools.partial(hvd.broadcast_variables, variables, root_rank=root_rank, inplace=inplace)
        assert wrap(send)() is None
        assert_of_rank(variables, root_rank)


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "function"])
def test_broadcast_in_place_returns_the_new_values(wrap):
    variables = my_variables()
    assert_of_rank(wrap(lambda: hvd.broadcast_(variables, hvd.size() - 1, name="all"))(), hvd.size() - 1)
    assert_of_rank(variables, hvd.size() - 1)


def test_broadcast_of_models_and_optimizers():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.BatchNormalization()])
    optimizer = keras.optimizers.Adam(0.1 * (hvd.rank() + 1))
    optimizer.build(model.trainable_variables)
    hvd.broadcast_variables(model.variables, root_rank=0)
    hvd.broadcast_variables(optimizer.variables, root_rank=0)
    everywhere = hvd.allgather_object(
        [each.numpy().tolist() for each in (*model.variables, *optimizer.variables)]
    )
    assert all(each == everywhere[0] for each in everywhere)
    assert float(optimizer.learning_rate) == pytest.approx(0.1)


def test_broadcast_of_no_variables():
    assert hvd.broadcast_variables([], 0) is None and hvd.broadcast_([], 0) == []


def test_ranks_with_other_variables_are_told():
    if hvd.size() < 2:
        pytest.skip("needs two ranks")
    shape = [2 + hvd.rank() % 2]
    with pytest.raises(hvd.MismatchError, match="kernel"):
        hvd.broadcast_variables([tf.Variable(tf.ones(shape), name="kernel")], 0)
    with pytest.raises(tf.errors.FailedPreconditionError, match="do not agree"):
        hvd.broadcast_variables([tf.Variable(tf.ones([2]))], hvd.rank() % 2)


def test_objects():
    for root_rank in range(hvd.size()):
        mine = {"rank": hvd.rank(), "values": [1, {2: "two"}] * hvd.rank()}
        received = hvd.broadcast_object(mine, root_rank, session=None, name="settings")
        assert received == {"rank": root_rank, "values": [1, {2: "two"}] * root_rank}
        assert hvd.broadcast_object_fn(root_rank=root_rank)(mine) == received
    assert hvd.broadcast_object(np.arange(3) if hvd.rank() == 0 else None).tolist() == [0, 1, 2]
    gathered = hvd.allgather_object({"rank": hvd.rank(), "long": "x" * hvd.rank()}, session=None, name="all")
    assert gathered == [{"rank": rank, "long": "x" * rank} for rank in range(hvd.size())]


def test_where_i_am(run):
    assert run(lambda: [hvd.rank_op(), hvd.size_op(), hvd.local_rank_op(), hvd.local_size_op()]) == [
        hvd.rank(),
        hvd.size(),
        hvd.local_rank(),
        hvd.local_size(),
    ]
    assert run(lambda: [hvd.size_op(0, "size"), hvd.process_set_included_op(0, "in")]) == [hvd.size(), 1]
    result = hvd.rank_op(name="rank")
    assert result.dtype == tf.int32 and result.shape == ()


def test_a_rank_with_fewer_batches_joins(run):
    """Rank r has r + 1 batches; the others go on with zeros in its place."""
    last = hvd.size() - 1

    def train(value):
        steps = [hvd.allreduce(value) for _ in range(hvd.rank() + 1)]
        with tf.control_dependencies(steps):
            return [*steps, hvd.join()]

    *steps, joined = run(train, np.float32([1.0]))
    np.testing.assert_allclose(
        np.ravel(steps), [(hvd.size() - step) / hvd.size() for step in range(hvd.rank() + 1)]
    )
    assert joined == last and joined.dtype == np.int32


def test_joined_ranks_have_no_rows():
    if hvd.rank() > 0:
        np.testing.assert_array_equal(hvd.allgather(tf.constant([hvd.rank()])), range(1, hvd.size()))
        np.testing.assert_allclose(
            hvd.allreduce(tf.ones([2]), op=hvd.Sum, prescale_factor=2.0), np.full(2, 2 * (hvd.size() - 1))
        )
    hvd.join()


def test_barrier_waits_for_all():
    hvd.barrier()
    tf.function(lambda: hvd.barrier())()
