"""DistributedOptimizer of loops of your own: around Keras' optimizers and around those of TensorFlow 1."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.tensorflow as hvd

pytestmark = pytest.mark.ranks

SGD = tf.compat.v1.train.GradientDescentOptimizer


def mean():
    return (hvd.size() + 1) / 2


def test_a_keras_optimizer_becomes_hvdtrain_keras_own():
    variable = keras.Variable([1.0, 1.0])
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.5), name="mine", compression=hvd.Compression.fp16, op=hvd.Sum
    )
    assert isinstance(optimizer, keras.optimizers.SGD)
    optimizer.apply_gradients([(tf.fill([2], hvd.rank() + 1.0), variable)])
    np.testing.assert_allclose(variable, np.full(2, 1 - 0.5 * mean() * hvd.size()), rtol=1e-3)


def test_arguments_reach_the_keras_optimizer():
    variable = keras.Variable([0.0])
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0), backward_passes_per_step=2, average_aggregated_gradients=True
    )
    for _ in range(2):
        optimizer.apply_gradients([(tf.fill([1], hvd.rank() + 1.0), variable)])
    np.testing.assert_allclose(variable, [-mean()], rtol=1e-6)


def test_one_of_tensorflow_1_reduces_when_it_computes():
    variable, local = tf.Variable([1.0, 1.0]), tf.Variable([1.0])
    optimizer = hvd.DistributedOptimizer(SGD(0.5), op=hvd.Average, groups=1)
    optimizer.register_local_var(local)

    def loss():
        return (hvd.rank() + 1.0) * (tf.reduce_sum(variable) + tf.reduce_sum(local))

    pairs = optimizer.compute_gradients(loss, [variable, local])
    np.testing.assert_allclose(pairs[0][0], np.full(2, mean()), rtol=1e-6)
    np.testing.assert_allclose(pairs[1][0], [(hvd.rank() + 1) / hvd.size()], rtol=1e-6)
    optimizer.apply_gradients(pairs)
    np.testing.assert_allclose(variable, np.full(2, 1 - 0.5 * mean()), rtol=1e-6)
    optimizer.minimize(loss, var_list=[variable, local])
    np.testing.assert_allclose(variable, np.full(2, 1 - mean()), rtol=1e-6)


def test_one_of_tensorflow_1_in_a_session():
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variable = tf.compat.v1.get_variable("variable", initializer=[float(hvd.rank()), 2.0])
        optimizer = hvd.DistributedOptimizer(tf.compat.v1.train.MomentumOptimizer(0.5, 0.0))
        step = optimizer.minimize((hvd.rank() + 1.0) * tf.reduce_sum(variable))
        send = hvd.broadcast_global_variables(0)
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(send)
        session.run(step)
        np.testing.assert_allclose(session.run(variable), [-0.5 * mean(), 2 - 0.5 * mean()], rtol=1e-6)
        assert (
            optimizer.get_slot_names() == ["momentum"]
            and optimizer.get_slot(variable, "momentum") is not None
        )
        assert optimizer.variables()


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "function"])
@pytest.mark.parametrize("average", [False, True])
def test_several_backward_passes_for_one_update(wrap, average):
    """Pass p of a window of three has the gradient p times rank + 1; the local variable's stays its rank's."""
    variable, local, unused = tf.Variable([0.0, 0.0]), tf.Variable([0.0]), tf.Variable(1.0)
    optimizer = hvd.DistributedOptimizer(
        SGD(1.0), backward_passes_per_step=3, average_aggregated_gradients=average
    )
    optimizer.register_local_var(local)
    factor = tf.Variable(0.0, trainable=False)

    @wrap
    def step():
        def loss():
            return factor * (hvd.rank() + 1.0) * (tf.reduce_sum(variable) + tf.reduce_sum(local))

        optimizer.apply_gradients(optimizer.compute_gradients(loss, [variable, local, unused]))

    window = (1 + 2 + 3) / (3 if average else 1)
    for applied in (1, 2):
        for number in (1, 2, 3):
            np.testing.assert_allclose(variable, np.full(2, -(applied - 1) * window * mean()), rtol=1e-6)
            factor.assign(number)
            step()
        np.testing.assert_allclose(variable, np.full(2, -applied * window * mean()), rtol=1e-6)
        np.testing.assert_allclose(local, [-applied * window * (hvd.rank() + 1) / hvd.size()], rtol=1e-6)


def test_sparse_gradients_are_added_up_as_dense_ones_only():
    table = tf.Variable(tf.zeros([3, 1]))
    for dense in (False, True):
        optimizer = hvd.DistributedOptimizer(SGD(1.0), backward_passes_per_step=2, sparse_as_dense=dense)
        for _ in range(2):
            if not dense:
                with pytest.raises(ValueError, match="sparse_as_dense=True"):
                    optimizer.compute_gradients(lambda: tf.reduce_sum(tf.gather(table, [0, 0])), [table])
            else:
                optimizer.minimize(lambda: tf.reduce_sum(tf.gather(table, [0, 0])), var_list=[table])
    np.testing.assert_allclose(table[:, 0], [-4, 0, 0])


def test_adasum_combines_what_the_updates_have_changed():
    if hvd.size() & (hvd.size() - 1):
        pytest.skip("needs a power of two")
    equal, orthogonal = tf.Variable([1.0]), tf.Variable(tf.zeros([hvd.size()]))
    optimizer = hvd.DistributedOptimizer(SGD(0.5), op=hvd.Adasum)
    optimizer.minimize(lambda: tf.reduce_sum(equal) + orthogonal[hvd.rank()], var_list=[equal, orthogonal])
    np.testing.assert_allclose(equal, [0.5], rtol=1e-6)
    np.testing.assert_allclose(orthogonal, np.full(hvd.size(), -0.5), rtol=1e-6)


def test_what_is_no_optimizer_and_what_cannot_be():
    with pytest.raises(TypeError, match="instance of keras"):
        hvd.DistributedOptimizer("sgd")
    with pytest.raises(ValueError, match="at least 1"):
        hvd.DistributedOptimizer(SGD(0.5), backward_passes_per_step=0)
    error = NotImplementedError if hvd.size() & (hvd.size() - 1) else ValueError
    with pytest.raises(error, match=r"must be 1|combines 2, 4, 8"):
        hvd.DistributedOptimizer(SGD(0.5), backward_passes_per_step=2, op=hvd.Adasum)
    with pytest.raises(ValueError, match="gradient_predivide_factor"):
        hvd.DistributedOptimizer(SGD(0.5), op=hvd.Sum, gradient_predivide_factor=2.0)


def test_scripts_of_tensorflow_1_are_told_what_to_write():
    for call in (hvd.broadcast_global_variables, hvd.BroadcastGlobalVariablesHook):
        with pytest.raises(RuntimeError, match="broadcast_variables"):
            call(0)


def test_the_hook_in_a_session():
    with tf.Graph().as_default():
        variable = tf.compat.v1.get_variable("variable", initializer=float(hvd.rank()))
        hook = hvd.BroadcastGlobalVariablesHook(hvd.size() - 1, device="")
        with tf.compat.v1.train.MonitoredSession(hooks=[hook]) as session:
            assert session.run(variable) == hvd.size() - 1
