"""Loops of one's own are verified too: at their second step, and what is wrong is told."""

import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.tensorflow as hvd

pytestmark = pytest.mark.ranks


def steps(variable, compiled):
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable * float(hvd.rank() + 1))
        return hvd.DistributedGradientTape(tape).gradient(loss, [variable])

    return tf.function(step) if compiled else step


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_differ_at_the_second_step_are_told(compiled, capfd):
    variable = tf.Variable([float(hvd.rank())])
    step = steps(variable, compiled)
    step()
    assert "warning" not in capfd.readouterr().err
    (gradient,) = step()
    told = capfd.readouterr().err
    assert ("do not hold the same weights" in told) == (hvd.rank() == 0 and hvd.size() > 1)
    np.testing.assert_allclose(gradient, [np.mean(range(1, hvd.size() + 1))])
    step()
    assert "warning" not in capfd.readouterr().err


@pytest.mark.parametrize("compiled", [False, True])
def test_a_broadcast_after_the_first_step_is_in_time(compiled, capfd):
    variable = tf.Variable([float(hvd.rank())])
    step = steps(variable, compiled)
    step()
    hvd.broadcast_variables([variable], root_rank=0)
    capfd.readouterr()
    step()
    told = capfd.readouterr().err
    assert ("verified at step 2" in told) == (hvd.rank() == 0 and hvd.size() > 1)
