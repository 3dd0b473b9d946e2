"""The names that a script uses around its training."""

import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.keras as hvd

pytestmark = pytest.mark.ranks


def test_every_public_name_exists_and_is_documented():
    for name in hvd.__all__:
        value = getattr(hvd, name)
        assert not callable(value) or value.__doc__, name


def test_where_i_am(engine):
    assert (hvd.rank(), hvd.size()) == (engine.rank, engine.size)
    assert 0 <= hvd.local_rank() < hvd.local_size() <= hvd.size()
    assert 0 <= hvd.cross_rank() < hvd.cross_size() <= hvd.size()
    assert hvd.is_homogeneous() == (len(set(hvd.allgather_object(hvd.local_size()))) == 1)


def test_a_second_init_changes_nothing(engine):
    from hvdtrain import runtime

    hvd.init()
    assert runtime.engine() is engine and hvd.is_initialized()


@pytest.mark.parametrize(
    "make", [float, np.float32, lambda v: tf.constant(float(v)), lambda v: [float(v), 2.0]]
)
def test_values_of_any_kind_are_reduced(make):
    result = hvd.allreduce(make(hvd.rank()), op=hvd.Sum)
    assert np.ravel(result)[0] == sum(range(hvd.size()))


def test_values_are_gathered_and_broadcast():
    np.testing.assert_array_equal(
        hvd.allgather(np.full(hvd.rank(), hvd.rank())), np.repeat(range(hvd.size()), range(hvd.size()))
    )
    np.testing.assert_array_equal(hvd.broadcast(tf.fill([2], hvd.rank()), 0), [0, 0])
    assert hvd.broadcast_object({"seed": hvd.rank()}, hvd.size() - 1) == {"seed": hvd.size() - 1}
    hvd.barrier()


def test_tensorflow_has_this_ranks_share_of_the_cores():
    if hvd.size() > 1:
        assert 1 <= tf.config.threading.get_intra_op_parallelism_threads() <= (hvd_cores() or 1)


def hvd_cores():
    from hvdtrain import cores

    return len(cores.allowed())


@pytest.mark.parametrize("call", [hvd.allreduce, hvd.allgather, lambda each: hvd.broadcast(each, 0)])
def test_collectives_of_values_say_that_they_are_none_of_a_graph(call):
    with pytest.raises(TypeError, match=r"inside a tf\.function"):
        tf.function(call)(tf.constant(1.0))
