"""A folder of checkpoints survives what happens to disks and processes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from hvdtrain.checkpoints.folder import DamagedError, Folder, InUseError, Lock, check

FILES = {"model.weights.h5": bytes(range(256)) * 4096, "state.json": b"{}"}

HOLDER = """
import sys
from pathlib import Path
from hvdtrain.checkpoints.folder import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path / "checkpoints")
    made.clean()
    return made


def names(folder):
    return [each.name for each in folder.entries()]


def test_the_newest_first_and_only_so_many(folder):
    for step in (3, 20, 100):
        folder.write(step, FILES, keep=2)
    assert names(folder) == ["step-000000100", "step-000000020"]
    assert folder.newest_whole() == (folder.path / "step-000000100", [])
    assert (folder.path / "latest").read_text() == "step-000000100\n"


def test_what_else_is_in_the_folder_stays(folder):
    for name in ("step-1", "step-2", "notes"):
        (folder.path / name).mkdir()
    folder.write(1, FILES, keep=1)
    assert folder.write(2, FILES, keep=1) == folder.newest_whole()[0]
    assert {"step-1", "step-2", "notes"} < {each.name for each in folder.path.iterdir()}


def test_a_folder_that_somebody_has_removed_is_made_again(folder):
    folder.write(1, FILES, keep=1)
    shutil.rmtree(folder.path)
    folder.write(2, FILES, keep=1)
    assert folder.newest_whole()[0].name == "step-000000002"


def test_one_of_the_same_step_takes_nothing_away(folder):
    first, second = folder.write(7, FILES, keep=5), folder.write(7, {"state.json": b"other"}, keep=5)
    assert first != second and folder.newest_whole()[0] == second
    check(first)
    (folder.path / "latest").unlink()
    assert folder.newest_whole()[0] == second


def test_a_run_that_went_back_goes_on_from_what_it_wrote_last(folder):
    for step in (10, 20, 15):
        folder.write(step, FILES, keep=3)
    assert folder.newest_whole()[0].name == "step-000000015"


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda entry: (entry / "state.json").unlink(), "state.json is missing"),
        (lambda entry: os.truncate(entry / "model.weights.h5", 99), "99 bytes in place of 1048576"),
        (lambda entry: (entry / "state.json").write_bytes(b"[]"), "checksum of state.json is wrong"),
        (lambda entry: (entry / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda entry: (entry / "manifest.json").write_bytes(b"\x00" * 40), "manifest.json cannot be read"),
        (lambda entry: (entry / "manifest.json").write_bytes(b"[1]"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_one_is_named(folder, harm, says):
    folder.write(1, FILES, keep=3)
    entry = folder.write(2, FILES, keep=3)
    harm(entry)
    with pytest.raises(DamagedError):
        check(entry)
    found, complaints = folder.newest_whole()
    assert found.name == "step-000000001"
    (complaint,) = complaints
    assert says in complaint and entry.name in complaint


def test_a_full_disk_leaves_the_one_before_whole(small_disk):
    folder = Folder(small_disk / "checkpoints")
    before = folder.write(1, FILES, keep=3)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb") as file:
        file.write(bytes(4 << 20))
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left"):
        folder.write(2, FILES, keep=3)
    check(before)
    assert names(folder) == [before.name] and not [*folder.path.glob(".partial-2*")]
    ballast.unlink()
    folder.write(3, FILES, keep=3)
    assert folder.newest_whole()[0].name == "step-000000003"


def test_a_disk_that_is_read_only(small_disk):
    folder = Folder(small_disk / "checkpoints")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only"):
        folder.clean()


def test_killed_at_any_moment_of_writing(folder):
    folder.write(1, FILES, keep=2)
    for turn in range(2, 40):
        child = os.fork()
        if not child:
            folder.write(turn, FILES, keep=2)
            os._exit(0)
        until = time.monotonic() + turn * 0.0004
        while time.monotonic() < until:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        again = Folder(folder.path)
        again.clean()
        found, complaints = again.newest_whole()
        assert not complaints
        check(found)
        assert {each.name for each in folder.path.iterdir()} <= {"latest", *names(again)}


def test_the_lock_names_who_holds_it_and_dies_with_its_process(folder):
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen(command, env={**os.environ, "SLURM_JOB_ID": "4711"}, text=True, **pipes)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InUseError, match=f"process {holder.pid} on host .*, Slurm job 4711"):
            Lock(folder.path)
    finally:
        holder.kill()
        holder.communicate()
    lock = Lock(folder.path)
    with pytest.raises(InUseError, match="by another model"):
        Lock(folder.path)
    lock.release()
    Lock(folder.path).release()
