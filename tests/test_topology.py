"""What each launcher's environment says, from environments as they were seen."""

import pytest

from hvdtrain.topology import Place, detect, launcher_variables, slurm_tasks

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
STEP = {
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_ID": "0",
}


@pytest.mark.parametrize(
    "environ, place",
    [
        ({}, None),
        ({"HOME": "/"}, None),
        (OPEN_MPI, Place("Open MPI", 3, 4, 1, 2)),
        (HYDRA, Place("Intel MPI or MPICH", 1, 2, 1, 2)),
        (STEP, Place("Slurm", 2, 4, 0, 2)),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}, Place("Slurm", 2, 4, 0, None)),
        ({"PMIX_RANK": "1"}, Place("PMIx", 1, None, None, None)),
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}, Place("horovodrun over Gloo", 1, 2, None, None)),
    ],
)
def test_each_launcher_is_recognised(environ, place):
    assert detect(environ) == place


def test_a_batch_script_is_not_a_rank():
    """sbatch sets these in the shell of the script, where `python train.py` is one process."""
    assert (
        detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}) is None
    )


@pytest.mark.parametrize(
    "environ, tasks",
    [
        ({"SLURM_NTASKS": "4"}, 0),
        ({"SLURM_JOB_ID": "7"}, 1),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}, 4),
        ({"SLURM_JOB_ID": "7", "SLURM_NPROCS": "3"}, 3),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"}, 8),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, 2),
    ],
)
def test_the_tasks_of_a_slurm_job(environ, tasks):
    assert slurm_tasks(environ) == tasks


def test_mpirun_inside_an_allocation_counts_not_the_srun_that_started_its_daemons():
    assert detect(STEP | {"SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI).size == 4


def test_all_variables_are_listed_for_whoever_must_drop_them():
    assert set(OPEN_MPI) | set(HYDRA) | set(STEP) <= launcher_variables()
