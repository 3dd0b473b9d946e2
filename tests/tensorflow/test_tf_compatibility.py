"""Small questions that scripts ask."""

import pytest
import tensorflow as tf

import hvdtrain.tensorflow as hvd
from hvdtrain.tensorflow import mpi_ops

pytestmark = pytest.mark.ranks


def test_lists_are_split_evenly():
    assert hvd.split_list(list(range(7)), 3) == [[0, 1, 2], [3, 4], [5, 6]]
    assert hvd.split_list([1], 3) == [[1], [], []]


def test_powers_of_two():
    assert [n for n in range(18) if hvd.check_num_rank_power_of_2(n)] == [1, 2, 4, 8, 16]


def test_variables_become_references_and_come_back():
    first, second = tf.Variable(1.0), tf.Variable(2.0)
    refs = hvd.vars_to_refs([[first], second])
    assert hash(refs) is not None
    (back,), other = hvd.refs_to_vars(refs)
    assert back is first and other is second


def test_what_is_built(engine):
    communicates = engine.name != "single"
    assert hvd.mpi_built() and hvd.mpi_enabled() == communicates
    assert isinstance(hvd.mpi_threads_supported(), bool)
    assert not hvd.gloo_built() and not hvd.gloo_enabled() and not hvd.ddl_built()
    assert isinstance(hvd.nccl_built(), int) and isinstance(hvd.cuda_built(), bool)
    assert not hvd.rocm_built() and not hvd.ccl_built()
    assert hvd.check_extension("horovod.tensorflow", "HOROVOD_WITH_TENSORFLOW", __file__, "mpi_lib") is None
    assert hvd.gpu_available("tensorflow") == bool(tf.config.list_physical_devices("GPU"))


def test_functions_that_layers_take_from_mpi_ops_sum_by_default():
    one = tf.ones([hvd.size()])
    assert float(mpi_ops._allreduce(one, "name")[0]) == hvd.size()
    assert float(mpi_ops._grouped_allreduce([one])[0][0]) == hvd.size()
    assert float(mpi_ops._reducescatter(one)[0]) == hvd.size()
    assert float(mpi_ops._grouped_reducescatter([one], op=hvd.Average, prescale_factor=2.0)[0][0]) == 2
    assert hvd.mpi_ops is mpi_ops and hvd._executing_eagerly()
