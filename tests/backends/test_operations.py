"""Collectives on tensors, given an engine: shapes that are known while a graph is built, and errors."""

import numpy as np
import pytest
import tensorflow as tf

from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.backends.tensorflow.argument_checks import ArgumentError
from hvdtrain.collectives.engine import Op
from hvdtrain.collectives.reduction import Reduction

pytestmark = pytest.mark.ranks


def shape_in_graph(operation, shape):
    """The shape of an operation's first result, as a graph knows it before it runs."""
    with tf.Graph().as_default():
        tensor = tf.compat.v1.placeholder(tf.float32, shape)
        result = tf.nest.flatten(operation(tensor))[0]
        return None if result.shape.rank is None else result.shape.as_list()


def test_shapes_that_a_graph_knows(engine):
    size = engine.size
    total = Reduction(Op.SUM)
    rows = [2 * size + 1, 3]
    cases = {
        "allreduce": (lambda each: differentiable.allreduce(engine, each, total), rows),
        "grouped_allreduce": (lambda each: differentiable.grouped_allreduce(engine, [each], total), rows),
        "broadcast": (lambda each: differentiable.broadcast(engine, [each], 0), rows),
        "allgather": (lambda each: differentiable.allgather(engine, [each]), [None, 3]),
        "alltoall": (lambda each: differentiable.alltoall(engine, each), [None, 3]),
        "reducescatter": (
            lambda each: differentiable.reducescatter(engine, [each], total),
            [2 + (engine.rank == 0), 3],
        ),
    }
    for name, (operation, expected) in cases.items():
        assert shape_in_graph(operation, rows) == expected, name
        assert shape_in_graph(operation, [None, 3]) == [None, 3], name
        assert shape_in_graph(operation, None) is None, name


def test_scalars_are_gathered_as_one_row(engine):
    (gathered,) = differentiable.allgather(engine, [tf.constant(engine.rank)])
    np.testing.assert_array_equal(gathered, range(engine.size))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_arrives(engine, value):
    result = differentiable.allreduce(engine, tf.constant([value, 1.0]), Reduction(Op.SUM, postscale=2.0))
    np.testing.assert_array_equal(result, [value, 2.0 * engine.size])


def test_inputs_stay_as_they_are(engine):
    mine = tf.constant([1.0, 2.0])
    for reduction in (Reduction(Op.SUM), Reduction(Op.AVERAGE, prescale=3.0), Reduction(Op.PRODUCT)):
        differentiable.allreduce(engine, mine, reduction)
        differentiable.grouped_allreduce(engine, [mine, mine], reduction)
    np.testing.assert_array_equal(mine, [1.0, 2.0])


def test_results_do_not_change_when_the_next_operation_runs(engine):
    """Buffers are used again; what a caller holds must not lie in them."""
    first = differentiable.grouped_allreduce(engine, [tf.ones([4]), tf.ones([2])], Reduction(Op.SUM))
    held = tf.function(lambda: differentiable.allreduce(engine, tf.ones([4]), Reduction(Op.SUM)))()
    for _ in range(3):
        differentiable.grouped_allreduce(engine, [tf.fill([4], 9.0), tf.fill([2], 9.0)], Reduction(Op.SUM))
        differentiable.allreduce(engine, tf.fill([4], 9.0), Reduction(Op.SUM))
    for each in (*first, held):
        np.testing.assert_array_equal(each, np.full(each.shape, engine.size))


def test_a_reduction_knows_whether_it_scales():
    assert not Reduction(Op.SUM).scales and not Reduction(Op.SUM, 1.0, 1.0).scales
    assert Reduction(Op.SUM, prescale=2.0).scales and Reduction(Op.SUM, postscale=0.5).scales


def test_what_is_refused_is_an_error_of_tensorflow_and_of_python(engine):
    with pytest.raises(ArgumentError, match="one dimension") as caught:
        differentiable.reducescatter(engine, [tf.constant(1.0)], Reduction())
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, tf.errors.InvalidArgumentError)
    assert str(caught.value).startswith("reducescatter:")


def test_inside_a_loop_of_a_graph(engine):
    @tf.function
    def three_times(tensor):
        for _ in tf.range(3):
            tensor = differentiable.allreduce(engine, tensor, Reduction(Op.SUM))
        return tensor

    np.testing.assert_allclose(three_times(tf.constant([1.0])), [engine.size**3])
