"""Ranks that ask for different things, and calls that cannot be: Horovod's classes of errors, on all ranks."""

import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.tensorflow as hvd

pytestmark = pytest.mark.ranks

needs_two = pytest.mark.usefixtures("two_ranks")


@pytest.fixture
def two_ranks():
    if hvd.size() < 2:
        pytest.skip("needs two ranks")


def odd():
    return hvd.rank() % 2 == 1


CALLS = {
    "allreduce": hvd.allreduce,
    "grouped_allreduce": lambda each: hvd.grouped_allreduce([tf.ones([2]), each]),
    "broadcast": lambda each: hvd.broadcast(each, 0),
    "reducescatter": hvd.reducescatter,
    "grouped_reducescatter": lambda each: hvd.grouped_reducescatter([each, each]),
    "allgather": hvd.allgather,
    "grouped_allgather": lambda each: hvd.grouped_allgather([each, each]),
    "alltoall": hvd.alltoall,
}
JOINED_BY_ROWS = {"allgather", "grouped_allgather", "alltoall"}


def assert_fails_alike(call):
    """The error that scripts for Horovod expect, with our message; afterwards the ranks still fit together."""
    with pytest.raises(tf.errors.FailedPreconditionError, match="do not agree") as caught:
        call()
    assert isinstance(caught.value, hvd.MismatchError) and "rank 1" in str(caught.value)
    assert hvd.allreduce(1.0, op=hvd.Sum) == hvd.size()


@needs_two
@pytest.mark.parametrize("name", CALLS)
def test_another_dtype_on_one_rank(name):
    mine = tf.ones([hvd.size(), 3], tf.int32 if odd() else tf.float32)
    assert_fails_alike(lambda: CALLS[name](mine))


@needs_two
@pytest.mark.parametrize("name", CALLS)
def test_another_number_of_dimensions_on_one_rank(name):
    mine = tf.ones([hvd.size()] * (3 if odd() else 2))
    assert_fails_alike(lambda: CALLS[name](mine))


@needs_two
@pytest.mark.parametrize("name", CALLS)
def test_another_last_dimension_on_one_rank(name):
    assert_fails_alike(lambda: CALLS[name](tf.ones([hvd.size(), 3 + odd()])))


@needs_two
@pytest.mark.parametrize("name", set(CALLS) - JOINED_BY_ROWS)
def test_another_first_dimension_on_one_rank(name):
    assert_fails_alike(lambda: CALLS[name](tf.ones([hvd.size() * (1 + odd())])))


@needs_two
def test_another_operation_root_or_factor_on_one_rank():
    one = tf.ones([hvd.size()])
    assert_fails_alike(lambda: hvd.allreduce(one, op=hvd.Sum if odd() else hvd.Max))
    assert_fails_alike(lambda: hvd.reducescatter(one, op=hvd.Sum if odd() else hvd.Average))
    assert_fails_alike(lambda: hvd.broadcast(one, int(odd())))
    assert_fails_alike(lambda: hvd.allreduce(one, prescale_factor=1.0 + odd()))
    assert_fails_alike(lambda: hvd.allreduce(one, postscale_factor=2.0 + odd()))
    assert_fails_alike(lambda: hvd.reducescatter(one, prescale_factor=2.0 + odd()))
    assert_fails_alike(lambda: hvd.allgather(one) if odd() else hvd.allreduce(one))
    assert_fails_alike(lambda: hvd.grouped_allreduce([one] * (1 + odd())))


@needs_two
def test_inside_a_function_the_explanation_arrives_too():
    function = tf.function(lambda each: hvd.allreduce(each))
    with pytest.raises(tf.errors.OpError, match="do not agree"):
        function(tf.ones([2 + odd()]))
    assert hvd.allreduce(1.0, op=hvd.Sum) == hvd.size()


SPLITS = {
    "too many": lambda size: [1] * (size + 1),
    "too few": lambda size: [1] * (size - 1),
    "beyond the rows": lambda size: [5] * size,
    "negative": lambda size: [-1] + [1] * (size - 1),
    "of two dimensions": lambda size: [[1]] * size,
    "int64 tensor": lambda size: tf.ones([size], tf.int64),
}


@pytest.mark.parametrize("name", SPLITS)
def test_splits_that_do_not_fit(name):
    for kind in (tf.errors.InvalidArgumentError, ValueError):
        with pytest.raises(kind, match="splits"):
            hvd.alltoall(tf.ones([hvd.size()]), splits=SPLITS[name](hvd.size()))


@needs_two
def test_rows_that_do_not_divide():
    with pytest.raises(tf.errors.InvalidArgumentError, match="must divide"):
        hvd.alltoall(tf.ones([hvd.size() + 1]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="must divide"):
        tf.function(hvd.alltoall)(tf.ones([hvd.size() + 1]))


@pytest.mark.parametrize("call", [hvd.reducescatter, hvd.alltoall])
def test_scalars_have_no_rows(call):
    for way in (call, tf.function(call)):
        for kind in (tf.errors.InvalidArgumentError, ValueError):
            with pytest.raises(kind, match="one dimension"):
                way(tf.constant(1.0))


@pytest.mark.parametrize("op", [hvd.Min, hvd.Max, hvd.Product, hvd.Adasum], ids=lambda op: op.name)
def test_reducescatter_knows_mean_and_sum(op):
    with pytest.raises(tf.errors.InvalidArgumentError, match="Average or Sum"):
        hvd.reducescatter(tf.ones([4]), op=op)


@pytest.mark.parametrize("root_rank", [-1, 1000])
def test_a_root_that_is_no_rank(root_rank):
    variable = tf.Variable([1.0])
    for call in (
        lambda: hvd.broadcast(tf.ones([1]), root_rank),
        lambda: hvd.broadcast_variables([variable], root_rank),
        lambda: hvd.broadcast_([variable], root_rank),
        lambda: hvd.broadcast_object({}, root_rank),
    ):
        with pytest.raises(ValueError, match="root_rank"):
            call()
    with pytest.raises(tf.errors.InvalidArgumentError, match="root_rank"):
        hvd.broadcast(tf.ones([1]), root_rank)


def test_what_cannot_be_reduced():
    for op in (hvd.Sum, hvd.Average):
        with pytest.raises(TypeError, match="bool"):
            hvd.allreduce(tf.constant([True]), op=op)
    with pytest.raises(TypeError, match="complex64"):
        hvd.allreduce(tf.constant([1j], tf.complex64))
    with pytest.raises(TypeError, match="objects"):
        hvd.allgather(tf.constant(["text"]))
    with pytest.raises(ValueError, match="Unknown reduction"):
        hvd.allreduce(tf.ones([1]), op=17)


def test_a_process_set_that_is_not_in_use_or_of_other_ranks(halves):
    _, other = halves
    foreign = [hvd.ProcessSet([0])] + ([other] if other else [])
    for process_set in foreign:
        for call in (hvd.allreduce, hvd.allgather, hvd.alltoall, hvd.reducescatter):
            with pytest.raises(tf.errors.InvalidArgumentError, match=r"not in use|does not belong"):
                call(np.ones(2, np.float32), process_set=process_set)
        with pytest.raises(ValueError, match=r"not in use|does not belong"):
            hvd.broadcast_object(1, 0, process_set=process_set)
