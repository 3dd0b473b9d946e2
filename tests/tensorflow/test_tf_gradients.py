"""What flows back through collectives: Horovod's conventions, in every mode."""

import numpy as np
import pytest
import tensorflow as tf
from modes import gradient

import hvdtrain.tensorflow as hvd

pytestmark = pytest.mark.ranks


def ranks():
    return np.arange(1, hvd.size() + 1, dtype=np.float64)  # this rank's upstream gradient is rank + 1


def mine(shape, dtype=np.float32):
    return np.full(shape, hvd.rank() + 1, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
def test_of_allreduce_it_is_reduced_in_the_same_way(run, dtype, shape):
    def back(tensor, upstream):
        return [
            *gradient(lambda each: hvd.allreduce(each, op=hvd.Sum), tensor, upstream=upstream),
            *gradient(hvd.allreduce, tensor, upstream=upstream),
            *gradient(
                lambda each: hvd.allreduce(each, op=hvd.Sum, prescale_factor=2.0, postscale_factor=0.25),
                tensor,
                upstream=upstream,
            ),
        ]

    of_sum, of_mean, scaled = run(back, np.ones(shape, dtype), mine(shape, dtype))
    np.testing.assert_allclose(of_sum, np.full(shape, ranks().sum()))
    np.testing.assert_allclose(of_mean, np.full(shape, ranks().mean()), rtol=1e-6)
    np.testing.assert_allclose(scaled, np.full(shape, ranks().sum() / 2), rtol=1e-6)
    assert of_sum.dtype == dtype


def test_of_grouped_allreduce_each_tensor_has_its_own(run):
    def back(first, second, upstream):
        def combined(*tensors):
            reduced = hvd.grouped_allreduce(tensors, op=hvd.Sum)
            return tf.reduce_sum(reduced[0] * upstream) + 3 * tf.reduce_sum(reduced[1])

        return gradient(combined, first, second)

    first, second = run(back, np.ones(2, np.float32), np.ones((2, 2), np.float32), mine(2))
    np.testing.assert_allclose(first, np.full(2, ranks().sum()))
    np.testing.assert_allclose(second, np.full((2, 2), 3.0 * hvd.size()))


def test_of_grouped_allreduce_where_one_result_is_not_used(run):
    def back(first, second):
        return gradient(lambda *each: hvd.grouped_allreduce(each, op=hvd.Sum), first, second)

    first, second = run(back, np.ones(2, np.float32), np.ones(3, np.float32))
    np.testing.assert_allclose(first, np.full(2, hvd.size()))
    np.testing.assert_allclose(second, np.zeros(3))


def test_of_allgather_it_is_this_ranks_rows_of_the_mean(run):
    """Rank r holds r + 1 rows, and its upstream gradient is its number times that of the row's owner."""
    owners = np.repeat(ranks(), np.arange(1, hvd.size() + 1))

    def back(tensor, upstream):
        return [
            *gradient(hvd.allgather, tensor, upstream=upstream),
            *gradient(lambda each: hvd.grouped_allgather([each, each * 2])[0], tensor, upstream=upstream),
        ]

    upstream = np.float32(owners * (hvd.rank() + 1))[:, None] * np.ones((1, 2), np.float32)
    for result in run(back, np.ones((hvd.rank() + 1, 2), np.float32), upstream):
        np.testing.assert_allclose(
            result, np.full((hvd.rank() + 1, 2), (hvd.rank() + 1) * ranks().mean()), rtol=1e-6
        )


def test_of_broadcast_it_is_the_mean_on_the_root_and_zero_elsewhere(run):
    root_rank = hvd.size() - 1
    (result,) = run(
        lambda tensor, upstream: gradient(
            lambda each: hvd.broadcast(each, root_rank), tensor, upstream=upstream
        ),
        np.ones((2, 2), np.float32),
        mine((2, 2)),
    )
    expected = ranks().mean() if hvd.rank() == root_rank else 0
    np.testing.assert_allclose(result, np.full((2, 2), expected), rtol=1e-6)


def test_of_alltoall_it_travels_back(run):
    """Rank r sends r + 1 rows to each; each row's gradient comes from whom it was sent to."""
    rows, received = (hvd.rank() + 1) * hvd.size(), int(ranks().sum())

    def back(tensor, upstream):
        splits = tf.fill([hvd.size()], hvd.rank() + 1)
        return gradient(lambda each: hvd.alltoall(each, splits), tensor, upstream=upstream)

    (result,) = run(back, np.ones((rows, 2), np.float32), mine((received, 2)))
    np.testing.assert_allclose(result[:, 0], np.repeat(ranks(), hvd.rank() + 1))


def test_of_alltoall_without_splits_and_of_rows_that_stay(run):
    (equal,) = run(
        lambda tensor, upstream: gradient(hvd.alltoall, tensor, upstream=upstream),
        np.ones((hvd.size(), 2), np.float32),
        mine((hvd.size(), 2)),
    )
    np.testing.assert_allclose(equal[:, 0], ranks())
    (partial,) = run(
        lambda tensor, upstream: gradient(
            lambda each: hvd.alltoall(each, tf.ones([hvd.size()], tf.int32)), tensor, upstream=upstream
        ),
        np.ones((hvd.size() + 2,), np.float32),
        mine((hvd.size(),)),
    )
    np.testing.assert_allclose(partial, [*ranks(), 0, 0])


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=lambda op: op.name)
def test_of_reducescatter_it_is_gathered(run, op):
    rows = 2 * hvd.size() + 1
    parts = [len(each) for each in np.array_split(np.arange(rows), hvd.size())]
    factor = hvd.size() if op == hvd.Sum else 1

    def back(tensor, upstream):
        return [
            *gradient(lambda each: hvd.reducescatter(each, op=op), tensor, upstream=upstream),
            *gradient(
                lambda each: hvd.reducescatter(each, op=op, prescale_factor=2.0, postscale_factor=3.0),
                tensor,
                upstream=upstream,
            ),
            *gradient(lambda each: hvd.grouped_reducescatter([each], op=op), tensor, upstream=upstream),
        ]

    plain, scaled, grouped = run(back, np.ones((rows, 2), np.float32), mine((parts[hvd.rank()], 2)))
    expected = factor * np.repeat(ranks(), parts)
    np.testing.assert_allclose(plain[:, 0], expected)
    np.testing.assert_allclose(grouped[:, 0], expected)
    np.testing.assert_allclose(scaled[:, 0], 6 * expected)


def test_a_gradient_can_be_differentiated_again():
    tensor = tf.Variable([float(hvd.rank() + 1)])
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            output = hvd.allreduce(tensor, op=hvd.Sum) ** 3
        first = inner.gradient(output, tensor)
    second = outer.gradient(first, tensor)
    total = ranks().sum()
    np.testing.assert_allclose(first, [3 * total**2 * hvd.size()], rtol=1e-6)
    np.testing.assert_allclose(second, [6 * total * hvd.size() ** 2], rtol=1e-6)


def test_a_sparse_gradient_that_comes_back_is_made_dense(run):
    def back(tensor):
        return gradient(lambda each: tf.gather(hvd.allreduce(each, op=hvd.Sum), [0, 0, 2]), tensor)

    (result,) = run(back, np.ones((3, 2), np.float32))
    np.testing.assert_allclose(result[:, 0], [2 * hvd.size(), 0, hvd.size()])


def test_upstream_of_another_float_dtype(run):
    """Scripts pass float32 ones to the gradient of a float64 tensor; TensorFlow lets them."""
    (result,) = run(
        lambda tensor, upstream: gradient(
            lambda each: hvd.allreduce(each, op=hvd.Sum), tensor, upstream=upstream
        ),
        np.ones(2, np.float64),
        np.ones(2, np.float32),
    )
    np.testing.assert_allclose(result, np.full(2, hvd.size()))


def test_through_compression():
    tensor = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        output = hvd.allreduce(tensor, op=hvd.Sum, compression=hvd.Compression.fp16)
    result = tape.gradient(output, tensor)
    assert result.dtype == tf.float32
    np.testing.assert_allclose(result, np.full(2, hvd.size()))


def test_of_variables_eagerly_and_in_a_function():
    variable = tf.Variable(tf.ones([2]))

    def back():
        with tf.GradientTape() as tape:
            output = hvd.allreduce(variable, op=hvd.Sum)
        return tape.gradient(output, variable)

    for each in (back, tf.function(back)):
        np.testing.assert_allclose(each(), np.full(2, hvd.size()))
