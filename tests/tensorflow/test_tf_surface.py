"""Nothing that `horovod.tensorflow` 0.28.1 offers is missing, and every call that it takes is taken."""

import importlib
import inspect

import pytest

import hvdtrain.tensorflow as hvd

pytestmark = pytest.mark.ranks

NAMES = """
    Adasum Average BroadcastGlobalVariablesHook Compression DistributedGradientTape DistributedOptimizer Max Min
    PartialDistributedGradientTape ProcessSet Product Sum SyncBatchNormalization add_process_set allgather
    allgather_object allreduce alltoall barrier broadcast broadcast_ broadcast_global_variables broadcast_object
    broadcast_object_fn broadcast_variables ccl_built check_extension check_num_rank_power_of_2 cross_rank
    cross_size cuda_built ddl_built global_process_set gloo_built gloo_enabled gpu_available grouped_allgather
    grouped_allreduce grouped_reducescatter handle_average_backwards_compatibility init is_homogeneous
    is_initialized join local_rank local_rank_op local_size local_size_op mpi_built mpi_enabled
    mpi_threads_supported nccl_built process_set_included_op rank rank_op reducescatter refs_to_vars
    remove_process_set rocm_built shutdown size size_op split_list start_timeline stop_timeline vars_to_refs
"""
SIGNATURES = {
    "allreduce": "tensor average device_dense device_sparse compression op prescale_factor postscale_factor name "
    "process_set ignore_name_scope",
    "grouped_allreduce": "tensors average device_dense device_sparse compression op prescale_factor "
    "postscale_factor process_set ignore_name_scope name",
    "allgather": "tensor name ignore_name_scope process_set",
    "grouped_allgather": "tensors name ignore_name_scope process_set",
    "broadcast": "tensor root_rank name ignore_name_scope process_set",
    "broadcast_": "variables root_rank name process_set",
    "alltoall": "tensor splits name ignore_name_scope process_set",
    "reducescatter": "tensor device_dense compression op name process_set ignore_name_scope prescale_factor "
    "postscale_factor",
    "grouped_reducescatter": "tensors device_dense compression op process_set prescale_factor postscale_factor",
    "broadcast_variables": "variables root_rank process_set inplace",
    "broadcast_object": "obj root_rank session name process_set",
    "broadcast_object_fn": "root_rank session name process_set",
    "allgather_object": "obj session name process_set",
    "broadcast_global_variables": "root_rank",
    "size_op": "process_set_id name",
    "process_set_included_op": "process_set_id name",
    "rank_op": "name",
    "local_rank_op": "name",
    "local_size_op": "name",
    "join": "",
    "DistributedOptimizer": "optimizer name use_locking device_dense device_sparse compression sparse_as_dense "
    "backward_passes_per_step op gradient_predivide_factor average_aggregated_gradients num_groups groups "
    "process_set scale_local_gradients",
    "DistributedGradientTape": "gradtape device_dense device_sparse compression sparse_as_dense op "
    "gradient_predivide_factor num_groups groups process_set scale_local_gradients",
    "PartialDistributedGradientTape": "gradtape device_dense device_sparse compression sparse_as_dense op "
    "gradient_predivide_factor num_groups groups process_set local_layers scale_local_gradients",
    "handle_average_backwards_compatibility": "op average",
    "check_num_rank_power_of_2": "num_rank",
    "split_list": "l n",
}
MODULES = {
    "mpi_ops": "init rank size allgather broadcast broadcast_ alltoall join rank_op size_op Average Sum",
    "functions": "broadcast_variables broadcast_object broadcast_object_fn allgather_object",
    "compression": "Compression Compressor NoneCompressor FP16Compressor",
    "sync_batch_norm": "SyncBatchNormalization",
    "util": "_executing_eagerly vars_to_refs refs_to_vars",
}


def test_every_name_is_there_and_documented():
    for name in NAMES.split():
        value = getattr(hvd, name)
        assert not callable(value) or value.__doc__, name
    assert sorted(hvd.__all__) == list(hvd.__all__) and set(NAMES.split()) <= set(hvd.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_have_horovods_names_and_order(name):
    assert list(inspect.signature(getattr(hvd, name)).parameters) == SIGNATURES[name].split()


@pytest.mark.parametrize("module", MODULES)
def test_modules_from_which_scripts_import(module):
    offered = importlib.import_module(f"hvdtrain.tensorflow.{module}")
    for name in MODULES[module].split():
        assert hasattr(offered, name), name


def test_the_numbers_of_the_operations_are_horovods():
    assert [hvd.Average, hvd.Sum, hvd.Adasum, hvd.Min, hvd.Max, hvd.Product] == [0, 1, 2, 3, 4, 5]


def test_against_the_horovod_that_is_installed(engine):
    """Compares with the module itself where it can be loaded without a second MPI in this process."""
    if engine.name != "horovod":
        pytest.skip("needs a loaded Horovod")
    theirs = engine.horovod
    public = {name for name in dir(theirs) if not name.startswith("_")} - {"tf", "os", "version", "warnings"}
    missing = {
        name for name in public if not hasattr(hvd, name) and not inspect.ismodule(getattr(theirs, name))
    }
    assert missing == set()
    for name in sorted(public):
        value = getattr(theirs, name)
        if inspect.isfunction(value):
            expected = inspect.signature(value).parameters
            offered = inspect.signature(getattr(hvd, name)).parameters
            takes_rest = any(each.kind is each.VAR_KEYWORD for each in expected.values())
            assert takes_rest or list(offered)[: len(expected)] == list(expected), name
