"""Gradients are reduced in TensorFlow's own memory, and nothing else that lies there changes."""

import traceback

import numpy as np
import pytest
import tensorflow as tf

from hvdtrain.backends.tensorflow import bridge
from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
from hvdtrain.collectives.engine import Call, Op
from hvdtrain.gradients.exchange import Exchange

# Each test with all gradients in one call, and with each part on its way while the next is computed.
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.usefixtures("way"),
    pytest.mark.parametrize("way", ["at once", "during backprop"], indirect=True),
]

SHAPE = (300, 400)  # large enough to travel alone


def reduced(engine, gradients):
    exchange = Exchange(engine, Op.AVERAGE, Call("gradients", ("test",)))
    return TensorFlowBridge().exchange(exchange, gradients, []).dense


def of_rank(rank, seed=0):
    return np.random.default_rng([rank, seed]).standard_normal(SHAPE).astype(np.float32)


def mean(engine, seed=0):
    return np.mean([of_rank(rank, seed) for rank in range(engine.size)], 0)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_computed_tensors_are_averaged_and_other_users_see_the_local_values(engine):
    @tf.function
    def step(x):
        gradient = x * 2.0
        before = tf.reduce_sum(gradient)
        (average,) = reduced(engine, [gradient])
        with tf.control_dependencies([average]):
            return average, before, gradient + 0.0

    mine = tf.constant(of_rank(engine.rank))
    for _ in range(3):
        average, before, local = step(mine)
        assert_close(average, 2 * mean(engine))
        assert_close(before, np.sum(2 * of_rank(engine.rank), dtype=np.float64))
        np.testing.assert_array_equal(local, 2 * of_rank(engine.rank))
    np.testing.assert_array_equal(mine, of_rank(engine.rank))


def test_what_a_users_function_calls_of_ours_is_not_rewritten(engine, monkeypatch):
    files = set()
    send = engine.grouped_allreduce

    def look(*args, **options):
        files.update(frame.filename for frame in traceback.extract_stack()[:-1])
        return send(*args, **options)

    monkeypatch.setattr(engine, "grouped_allreduce", look)

    @tf.function
    def step(x):
        return reduced(engine, [x * 2.0])

    assert_close(step(tf.constant(of_rank(engine.rank)))[0], 2 * mean(engine))
    if engine.native_tensors() is None:
        assert bridge.__file__ in files
    assert not any("autograph" in name.rpartition("/")[2] for name in files), files


def test_constants_inputs_and_variables_stay_as_they_are(engine):
    mine = of_rank(engine.rank)
    variable, given = tf.Variable(mine), tf.constant(mine)

    @tf.function
    def step(x):
        return reduced(
            engine,
            [tf.constant(mine), x, variable.read_value(), tf.fill(SHAPE, float(engine.rank)), tf.identity(x)],
        )

    for _ in range(3):
        constant, argument, read, filled, same = step(given)
        for each in (constant, argument, read, same):
            assert_close(each, mean(engine))
        assert_close(filled, np.full(SHAPE, np.mean(range(engine.size))))
    np.testing.assert_array_equal(variable, mine)
    np.testing.assert_array_equal(given, mine)


def test_what_follows_from_constants_is_computed_from_their_mean(engine):
    """TensorFlow computes beforehand what it can, and so it would compute from what this rank alone has."""

    @tf.function
    def step():
        (average,) = reduced(engine, [tf.tile(tf.fill([1, 1], engine.rank + 1.0), SHAPE)])
        return average, 0.1 * average, tf.cast(average, tf.float64), tf.reshape(average, [-1])

    for _ in range(3):
        plain, scaled, wider, flat = step()
        expected = (engine.size + 1) / 2
        for each, factor in ((plain, 1), (scaled, 0.1), (wider, 1), (flat, 1)):
            assert_close(each, np.full(each.shape, factor * expected))


def test_one_gradient_of_two_variables(engine):
    first, second = tf.Variable(tf.zeros(SHAPE)), tf.Variable(tf.zeros(SHAPE))

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(x * first) + tf.reduce_sum(x * second) + tf.reduce_sum(3.0 * x * second)
        a, b = tape.gradient(loss, [first, second])
        return reduced(engine, [a, b, a, x * 2.0, x * 2.0])

    mine = tf.constant(of_rank(engine.rank))
    for _ in range(2):
        for each, factor in zip(step(mine), (1, 4, 1, 2, 2), strict=True):
            assert_close(each, factor * mean(engine))
    np.testing.assert_array_equal(mine, of_rank(engine.rank))


def test_a_part_of_a_tensor_changes_nothing_of_the_rest(engine):
    @tf.function
    def step(x):
        both = tf.stack([x, x + 1.0])
        (average,) = reduced(engine, [both[0]])
        with tf.control_dependencies([average]):
            return average, tf.identity(both)

    average, both = step(tf.constant(of_rank(engine.rank)))
    assert_close(average, mean(engine))
    np.testing.assert_array_equal(both[0], of_rank(engine.rank))


def test_large_and_small_in_loops_and_branches(engine):
    @tf.function
    def steps(x, count):
        total, small = tf.zeros(SHAPE), tf.zeros([3])
        for turn in tf.range(count):
            factor = tf.cast(turn + 1, tf.float32)
            local = x + 0.0 * total  # as weights do, the next step waits for this one
            if turn % 2 == 0:
                large, few = reduced(engine, [local * factor, local[0, :3] * factor])
            else:
                large, few = reduced(engine, [local, local[0, :3]])
            total, small = total + large, small + few
        return total, small

    total, small = steps(tf.constant(of_rank(engine.rank)), 4)
    assert_close(total, 6 * mean(engine))
    assert_close(small, 6 * mean(engine)[0, :3])


def test_parts_go_in_the_order_of_backprop_and_an_error_comes_to_who_waits(engine, way):
    if engine.background is None or engine.size == 1:
        pytest.skip("only during backprop")
    done = []
    for number in range(3):
        engine.background.start(lambda number=number: done.append(number))
    assert engine.background.finish() == [None] * 3 and done == [0, 1, 2]

    def fail():
        raise ValueError("broken")

    engine.background.start(fail)
    engine.background.start(lambda: done.append("after the error"))
    with pytest.raises(ValueError, match="broken"):
        engine.background.finish()
    assert done == [0, 1, 2]
    engine.background.start(lambda: engine.allreduce(np.ones(3), Op.SUM))
    engine.barrier()  # whatever else is asked for comes after
    assert not engine.background.is_busy


def test_many_parts_of_mixed_sizes(engine):
    shapes = [(5,), (700, 800), (3, 4), (1100, 1000), (), (900, 900), (2,)]

    def of(rank):
        return [
            np.random.default_rng([rank, place]).standard_normal(shape).astype(np.float32)
            for place, shape in enumerate(shapes)
        ]

    @tf.function
    def step(*mine):
        return reduced(engine, [each * 1.0 for each in mine])

    for _ in range(2):
        results = step(*map(tf.constant, of(engine.rank)))
        for result, *every in zip(results, *map(of, range(engine.size)), strict=True):
            assert_close(result, np.mean(every, 0))


def test_a_rank_that_joins_lets_the_others_go_on(engine):
    @tf.function
    def step(x):
        return reduced(engine, [x * 1.0, x[0, :5] * 1.0])

    mine = tf.constant(of_rank(engine.rank))
    step(mine)
    if engine.rank == 0:
        for _ in range(2):
            large, small = step(mine)
            assert_close(large, of_rank(0) / engine.size)
            assert_close(small, of_rank(0)[0, :5] / engine.size)
    assert engine.join() in range(engine.size)
    assert_close(step(mine)[0], mean(engine))


def test_a_rank_that_ends_early_is_an_error_on_all(engine):
    if engine.size == 1:
        pytest.skip("nobody else is there")

    @tf.function
    def step(x):
        return reduced(engine, [x * 1.0])

    mine = tf.constant(of_rank(engine.rank))
    step(mine)
    with pytest.raises(Exception, match="do not agree on their next operation"):
        step(mine) if engine.rank == 0 else engine.barrier()
    assert_close(step(mine)[0], mean(engine))


def test_a_step_that_is_broken_off_leaves_nothing_to_the_next(engine):
    """The gradients are on their way, when something else of the step fails."""

    @tf.function
    def step(x, limit):
        first = x * 1.0
        if engine.background is None or engine.size == 1:
            tf.debugging.assert_less(limit, 1.0, "broken off")
            return reduced(engine, [first])
        started = reduced(engine, [first, tf.where(limit < 1.0, x[:2] * 1.0, x[:2])])
        with tf.control_dependencies([first]):
            tf.debugging.assert_less(limit, 1.0, "broken off")
        return started

    mine = tf.constant(of_rank(engine.rank))
    for limit in (0.0, 2.0, 0.0, 2.0):
        if limit:
            with pytest.raises(tf.errors.InvalidArgumentError, match="broken off"):
                step(mine, tf.constant(limit))
        else:
            assert_close(step(mine, tf.constant(limit))[0], mean(engine))
    engine.barrier()
    assert_close(step(mine, tf.constant(0.0))[0], mean(engine))


def test_memory_of_python_is_left_alone_behind_whatever_name(engine):
    cached = np.zeros(SHAPE[0] * SHAPE[1] + 16, np.float32)
    begin = -cached.ctypes.data % 64 // 4  # where TensorFlow needs no copy
    cached = cached[begin : begin + SHAPE[0] * SHAPE[1]]
    cached[:] = of_rank(engine.rank).reshape(-1)

    @tf.function
    def step():
        (made,) = [tf.numpy_function(lambda: cached, [], tf.float32)]
        made.set_shape([SHAPE[0] * SHAPE[1]])
        return reduced(engine, [tf.reshape(tf.identity(made), SHAPE)])

    for _ in range(2):
        assert_close(step()[0], mean(engine))
        np.testing.assert_array_equal(cached.reshape(SHAPE), of_rank(engine.rank))
