"""The runner of the suite, on small suites: what it counts, how it ends, and that nothing survives it."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from runner.launches import ENGINES, Launch, quick, whole
from runner.reporting import Report

TESTS = Path(__file__).parent
RUN = [sys.executable, str(TESTS / "run_all.py")]
# The runner's clock leaps as soon as both ranks are in the test that hangs, so that no real time decides.
LEAPING = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import run_all
from runner import following

folder = Path(sys.argv.pop(1))
leap = lambda: 1e6 * ((folder / "0").exists() and (folder / "1").exists())
following.time = SimpleNamespace(monotonic=lambda: time.monotonic() + leap())
sys.exit(run_all.main())
"""
WAITING = """
import os, signal, subprocess, sys
from pathlib import Path
import pytest

def waits_for_ever():
    while True:  # the signal that asks for the stacks ends a pause
        signal.pause()

@pytest.mark.ranks
def test_that_hangs():
    subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
    Path(__file__).with_name(os.environ["OMPI_COMM_WORLD_RANK"]).touch()
    waits_for_ever()
"""
ALONE = WAITING.replace('os.environ["OMPI_COMM_WORLD_RANK"]', '"0"').replace("@pytest.mark.ranks", "")
COUNTED = """
import os, subprocess, sys, pytest

def test_right(): pass
def test_wrong(): assert 1 == 2
def test_left_out(): pytest.skip("no reason at all")
def test_untidy():
    subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
def test_crash(): os._exit(7)
def test_after(): pass
"""


class Suite:
    """A suite of one file, with the real conftest.py; marks all processes that it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "test_small.py"
        self._mark = f"SUITE={uuid.uuid4().hex}"
        shutil.copy(TESTS / "conftest.py", folder)
        shutil.copy(TESTS.parent / "pyproject.toml", folder)

    def start(self, text: str, *options: str, command=RUN) -> subprocess.Popen:
        self.file.write_text(text)
        paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        return subprocess.Popen(
            [*command, "--one", str(self.file), *options],
            env={**os.environ, "PYTHONPATH": paths, **dict([self._mark.split("=")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def alive(self) -> list[str]:
        """Lists the suite's processes by their command lines."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found


@pytest.fixture
def suite(tmp_path):
    return Suite(tmp_path)


@pytest.mark.jobs
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("text", "size"), [(WAITING, 2), (ALONE, 0)], ids=["ranks", "one process"])
def test_a_signal_ends_all_that_was_started(suite, number, text, size):
    process = suite.start(text, "--sizes", str(size))
    while not all((suite.folder / str(rank)).exists() for rank in range(size or 1)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert len(suite.alive()) >= 3
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == 128 + number, output
    assert suite.alive() == []
    assert f"Ended by {number.name}, with all that was started." in output
    assert output.splitlines()[-1].startswith("0 passed, 0 failed, 1 not run in ")


@pytest.mark.jobs
def test_a_hang_is_shown_with_the_stacks_of_all_ranks_and_ended(suite):
    command = [sys.executable, "-c", LEAPING, str(suite.folder)]
    output, _ = suite.start(WAITING, "--sizes", "2", command=command).communicate()
    assert "mpi, 2 ranks hangs: for 900 s no test has begun or ended." in output
    assert output.count("in waits_for_ever\n") == 2
    for rank in range(2):
        assert f"\nRank {rank} (process " in output
    assert "Still running:\n" in output and "mpirun -n 2" in output
    assert output.splitlines()[-1].startswith("0 passed, 1 failed in ")
    assert suite.alive() == []


@pytest.mark.jobs
def test_what_passed_failed_was_skipped_or_never_ran_is_counted(suite):
    process = suite.start(COUNTED, "--sizes", "0")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("2 passed, 2 failed, 1 skipped, 1 not run in ")
    assert "skipped 1: no reason at all" in output
    assert "ended with exit code 7 in " in output and "test_small.py::test_crash" in output
    assert "Left running by tests, and ended:" in output
    assert suite.alive() == []


def heard(report, kind, **facts):
    report.hear({"kind": kind, "rank": 0, **facts})


def test_the_time_left_is_what_the_rest_took_before_at_todays_pace(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("runner.reporting.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("runner.reporting.EVERY", 0)
    launches = [Launch("mpi", 2), Launch("horovod", 2)]
    for pace in (10, 20):
        report = Report(launches, tmp_path / "record.json")
        for launch in launches:
            report.begin(launch)
            heard(report, "collected", tests=2)
            for test in ("one", "two"):
                heard(report, "started", test=test)
                clock[0] += pace
                heard(report, "phase", test=test, seconds=pace)
                heard(report, "finished", test=test)
                heard(report, "tick")
            report.end(launch, 0)
        report.close()
    text = capsys.readouterr().out
    assert "mpi, 2 ranks (1/2) | 1/2 tests | 0:10 | about 0:10 left and 1 more | one\n" in text
    assert "mpi, 2 ranks (1/2) | 1/2 tests | 0:20 | about 1:00 left | one\n" in text
    assert "Slowest:\n   20.0 s  " in text
    assert text.endswith("\n4 passed, 0 failed in 1:20\n")


def test_the_plans_hold_every_engine_and_size():
    assert [str(launch) for launch in quick(ENGINES)] == ["without ranks", "mpi, 2 ranks", "horovod, 2 ranks"]
    sizes = {(launch.engine, launch.size) for launch in whole(ENGINES)}
    ranks = {(engine, size) for engine in ("mpi", "horovod") for size in (1, 2, 4)}
    assert sizes == {("plain", 0), ("single", 0), *ranks}
    assert [launch.paths for launch in whole(("mpi",), [2])] == [("tests",)]
