"""A timeline that the environment asks for: through `hvdtrain run` to every rank, and from the ranks into files."""

import importlib.util
import json
import signal
import subprocess
import sys

import pytest

from hvdtrain.launch.launchers.mpirun import forwarded_names
from hvdtrain.launch.start_plan import clean_environ

MERGE = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "timeline", "merge"]
SETTINGS = (
    "HOROVOD_TIMELINE",
    "HOROVOD_TIMELINE_MARK_CYCLES",
    "HVDTRAIN_TIMELINE",
    "HVDTRAIN_TIMELINE_MARK_CYCLES",
)

# No barrier of mpi4py's before: hvd.init() is the first to talk to MPI, as in a user's script.
OPENING = """
import json, os, signal, sys, time
from pathlib import Path
import numpy as np
import hvdtrain.keras as hvd

hvd.init()
"""
ENGINES = [
    "mpi",
    pytest.param(
        "horovod",
        marks=pytest.mark.skipif(not importlib.util.find_spec("horovod"), reason="Horovod is not built"),
    ),
]


def events(path):
    return json.loads(path.read_text())


def phases(path, native=False):
    return {
        each["name"]
        for each in events(path)
        if each["ph"] == "B" and (each.get("cat") == "horovod") == native
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_reach_the_ranks_of_a_job_started_within_a_job_and_on_other_hosts(name):
    around = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", name: "t.json"}
    assert clean_environ(around) == {name: "t.json"}
    assert forwarded_names({name: "t.json"}) == [name]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_writes_a_whole_file_that_can_be_merged(jobs, engine):
    script = "for _ in range(3):\n    hvd.allreduce(np.ones(9))\n"
    settings = {"HVDTRAIN_ENGINE": engine, "HOROVOD_TIMELINE": "t.json", "HOROVOD_TIMELINE_MARK_CYCLES": "1"}
    done = jobs.run(script, opening=OPENING, **settings)
    assert done.returncode == 0, done.stderr
    files = [jobs.folder / "t.json", jobs.folder / "t.rank1.json"]
    for path in files:
        assert {"NEGOTIATE_ALLREDUCE", "ALLREDUCE"} <= phases(path)
        assert any(each.get("name") == "CYCLE_START" for each in events(path))
    core = phases(files[0], native=True)
    assert ("MPI_ALLREDUCE" in core and "NEGOTIATE_ALLREDUCE" in core) == (engine == "horovod")
    merged = subprocess.run([*MERGE, "t.json"], cwd=jobs.folder, capture_output=True, text=True)
    assert merged.returncode == 0 and "of 2 ranks" in merged.stdout and merged.stderr == ""
    assert sorted(each.name for each in jobs.folder.glob("*.json")) == [
        "t.json",
        "t.merged.json",
        "t.rank1.json",
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_dynamic_waits_for_the_script_and_shutdown_ends_the_file(jobs, engine):
    script = """
assert not list(Path().glob("*.json"))
hvd.barrier()
hvd.start_timeline("t.json")
hvd.allreduce(np.ones(9))
hvd.shutdown()
mine = Path("t.rank1.json" if os.environ["OMPI_COMM_WORLD_RANK"] == "1" else "t.json")
print(sorted({each["name"] for each in json.loads(mine.read_text()) if each["ph"] == "B"}))
for function in (lambda: hvd.start_timeline("u.json"), hvd.stop_timeline):
    try:
        function()
    except ValueError as error:
        assert "hvd.init()" in str(error)
    else:
        raise AssertionError
"""
    done = jobs.run(script, opening=OPENING, HVDTRAIN_ENGINE=engine, HOROVOD_TIMELINE="DYNAMIC")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().count("'NEGOTIATE_ALLREDUCE'") == 2
    assert ("'MPI_ALLREDUCE'" in done.stdout.decode()) == (engine == "horovod")
    assert sorted(each.name for each in jobs.folder.glob("*.json")) == ["t.json", "t.rank1.json"]


def test_a_path_that_cannot_be_written_is_said_by_each_rank_and_training_goes_on(jobs):
    script = "print(hvd.allreduce(np.ones(1)))\n"
    done = jobs.run(script, opening=OPENING, HVDTRAIN_ENGINE="mpi", HVDTRAIN_TIMELINE="absent/t.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().count("[1.]") == 2
    for rank, name in enumerate(("t.json", "t.rank1.json")):
        assert f"Rank {rank}: the timeline cannot be written (No such file or directory)" in done.stderr
        assert f"absent/{name}" in done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_that_is_killed_leaves_what_the_merge_needs_to_say_where(jobs, engine):
    script = """
for step in range(20):
    hvd.allreduce(np.ones(9))
    if hvd.rank() == 1 and step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    done = jobs.run(script, opening=OPENING, HVDTRAIN_ENGINE=engine, HVDTRAIN_TIMELINE="t.json")
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    assert [each.get("name") for each in events(jobs.folder / "t.rank1.json") if each["ph"] == "B"][
        -1
    ] == "ALLREDUCE"
    merged = subprocess.run([*MERGE, "t.json"], cwd=jobs.folder, capture_output=True, text=True)
    assert merged.returncode == 0, merged.stderr
    assert "of 2 ranks" in merged.stdout
    assert "Rank 0's file ends during NEGOTIATE_ALLREDUCE of 'allreduce'" in merged.stdout
