"""Ranks that wait for one that does not come: all is said, nothing is ended too early, nothing hangs for ever."""

import importlib.util
import os
import signal
import sys

import pytest

from hvdtrain.launch.launchers import mpirun

# A loop of ten steps on the wire alone; what a test adds happens in each of them.
LOOP = """
import ctypes, os, signal, sys, time
from pathlib import Path
import numpy as np
from hvdtrain import heartbeat, runtime

engine = runtime.init()
rank, size = engine.rank, engine.size

def between(step):
    {between}

for step in range(1, 11):
    heartbeat.at(0, step)
    between(step)
    total = engine.allreduce(np.ones(3), "sum")
assert total[0] == size
while Path("stay").exists():  # a test that waits for the last words keeps the job from ending before them
    time.sleep(0.05)
print("rank", rank, "is through", flush=True)
"""
QUICK = {"HVDTRAIN_ENGINE": "mpi", "HVDTRAIN_STALL_SECONDS": "1"}


class Watched:
    """A job whose words are read as they come."""

    def __init__(self, process, folder):
        self.process, self.folder = process, folder
        self.text = self._new = ""

    def hear(self, words):
        """Waits until the job has said something; returns all that it has said since it was last heard."""
        while words not in self._new:
            line = self.process.stderr.readline().decode()
            assert line, f"it ended without saying {words!r}: {self.text}"
            self.text += line
            self._new += line
        said, self._new = self._new, ""
        return said

    def end(self):
        """Waits for its end; returns its exit code."""
        (self.folder / "stay").unlink(missing_ok=True)
        _, stderr = self.process.communicate()
        self.text += stderr.decode()
        return self.process.returncode

    def files(self):
        return sorted(self.folder.glob("hvdtrain-stall-*.txt"))


@pytest.fixture
def watch(jobs):
    started = []

    def start(between, np=2, stays=False, **how):
        how = {"opening": "", **QUICK, **how}
        if stays:
            (jobs.folder / "stay").touch()
        started.append(Watched(jobs.start(LOOP.format(between=between), np=np, **how), jobs.folder))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


def stopped(text):
    """Reads whom to let go on, and where that is to be typed."""
    return int(text.partition("`kill -CONT ")[2].partition("`")[0])


def test_a_stopped_rank_is_named_and_when_it_goes_on_so_does_the_job(watch):
    watched = watch("if rank == 2 and step == 4: os.kill(os.getpid(), signal.SIGSTOP)", np=4, stays=True)
    text = watched.hear("The stacks of all ranks are in")
    assert "hvdtrain: ranks 0,1,3 wait in allreduce (float64 of shape (3,), op=sum) at step 4 for " in text
    assert "; rank 2 is at step 4, stopped (SIGSTOP): `kill -CONT " in text
    os.kill(stopped(text), signal.SIGCONT)
    watched.hear("hvdtrain: the ranks continue, after ")
    assert watched.end() == 0, watched.text
    (file,) = watched.files()
    assert file.read_text().count(" in _compared") == 3
    assert all(f"\nrank {rank} (host " in file.read_text() for rank in range(4))


def test_a_rank_that_hangs_is_shown_with_its_stack_in_python_and_in_native_code(watch):
    between = """
    if (rank, step) == (1, 3): Path("in Python").read_text()
    if (rank, step) == (0, 6): assert ctypes.CDLL(None).open(b"in native code", 0) > 0
    if (rank, step) == (1, 9): assert ctypes.PyDLL(None).open(b"and it holds the GIL", 0) > 0
"""
    script_lines = LOOP.partition("{between}")[0].count("\n")
    places = {"in Python": (1, 0, 3), "in native code": (0, 1, 6), "and it holds the GIL": (1, 0, 9)}
    watched = watch(between, stays=True)
    for name in places:
        os.mkfifo(watched.folder / name)
    for number, (name, (late, other, step)) in enumerate(places.items(), start=2):
        text = watched.hear("The stacks of all ranks are in")
        waits = (
            f"hvdtrain: rank {other} waits in allreduce (float64 of shape (3,), op=sum) at step {step} for "
        )
        assert waits in text
        assert f"; rank {late} is at step {step}, in:\n" in text
        assert f'  File "the script.py", line {script_lines + number} in between\n' in text, text
        os.close(os.open(watched.folder / name, os.O_WRONLY))
        watched.hear("hvdtrain: the ranks continue, after ")
    assert watched.end() == 0, watched.text


def test_after_the_second_limit_the_job_ends_with_an_error(jobs, watch):
    leave_pids = jobs.leave_pids.strip().replace("\n", "; ")
    between = (
        f"if step == 2: {leave_pids}\n    if (rank, step) == (1, 4): os.kill(os.getpid(), signal.SIGSTOP)"
    )
    watched = watch(between, HVDTRAIN_STALL_ABORT_SECONDS="2")
    pids = jobs.pids(2)
    assert watched.end() == 124
    last = watched.text.splitlines()[-1]
    assert last.startswith("hvdtrain: rank 1 of 2 (host ")
    assert (
        "other ranks have waited for it longer than HVDTRAIN_STALL_ABORT_SECONDS=2 allows: rank 0 waits in "
        "allreduce" in last
    )
    assert f"rank 1 is at step 4, stopped (SIGSTOP): `kill -CONT {pids[2]}`" in last
    jobs.assert_gone(pids)


def test_a_rank_that_is_at_work_is_named_once_and_gently(watch):
    between = 'while (rank, step) == (1, 4) and not Path("enough").exists(): pass'
    watched = watch(between, stays=True, HVDTRAIN_STALL_ABORT_SECONDS="1")
    text = watched.hear("Nothing is wrong as long as that continues.\n")
    assert "; rank 1 is at step 4, at work, in:\n" in text
    (watched.folder / "enough").touch()
    assert "stacks of all ranks" not in watched.hear("hvdtrain: the ranks continue, after ")
    assert watched.end() == 0, watched.text
    assert watched.files() == []


def test_nothing_is_said_while_all_compile_or_validate_nor_of_one_that_compiles_a_little_longer(watch):
    """A busy rank in its first step is one that compiles; then all ranks do something for themselves."""
    between = """
    end = time.monotonic() + {1: 3 + 3 * rank}.get(step, 0)
    while time.monotonic() < end: pass
    if step == 5: time.sleep(4)
"""
    watched = watch(between, HVDTRAIN_STALL_SECONDS="2", HVDTRAIN_STALL_ABORT_SECONDS="2")
    assert watched.end() == 0
    assert watched.text == ""
    assert watched.files() == []


def test_a_guard_that_is_cut_off_is_told_from_a_rank_that_hangs(jobs, watch):
    """As with a host that is lost: neither the rank nor anything else there answers."""
    leave_pids = jobs.leave_pids.strip().replace("\n", "; ")
    hang = "[os.kill(pid, signal.SIGSTOP) for pid in (os.getppid(), os.getpid())]"
    watched = watch(f"if step == 2: {leave_pids}\n    if (rank, step) == (1, 4): {hang}")
    pids = jobs.pids(2)
    text = watched.hear("The stacks of all ranks are in")
    assert "; rank 1 does not answer: its host " in text
    for pid in pids[2:]:
        os.kill(pid, signal.SIGCONT)
    assert watched.end() == 0, watched.text


def test_without_a_launcher_each_rank_that_waits_says_so_and_ends_the_job(watch):
    found = mpirun.find()
    command = [*found.command(2, (), ()), sys.executable, "the script.py"]
    between = "if (rank, step) == (1, 4): os.kill(os.getpid(), signal.SIGSTOP)"
    settings = found.settings(os.environ)
    watched = watch(between, command=command, HVDTRAIN_STALL_ABORT_SECONDS="2", **settings)
    assert watched.end() == 124
    assert (
        "hvdtrain: rank 0 of 2 waits in allreduce (float64 of shape (3,), op=sum) at step 4 since "
        in watched.text
    )
    assert "The other ranks wait for a rank that prints no such message." in watched.text
    assert "longer than HVDTRAIN_STALL_ABORT_SECONDS=2 allows, so the job ends here" in watched.text
    assert " in _compared" in watched.files()[0].read_text()


def test_ranks_are_not_disturbed_by_being_asked_and_users_keep_their_signals(watch):
    between = """
    if step == 1:
        import faulthandler
        faulthandler.enable(open(f"mine {rank}", "w"))
        faulthandler.register(signal.SIGUSR1, open(f"asked {rank}", "w"))
        signal.signal(signal.SIGALRM, lambda *_: Path(f"alarm {rank}").touch())
    if (rank, step) == (1, 4): Path("fifo").read_text()
    if step == 6: signal.raise_signal(signal.SIGUSR1); signal.raise_signal(signal.SIGALRM)
"""
    watched = watch(between)
    os.mkfifo(watched.folder / "fifo")
    watched.hear("The stacks of all ranks are in")
    os.close(os.open(watched.folder / "fifo", os.O_WRONLY))
    assert watched.end() == 0, watched.text
    for rank in range(2):
        assert "most recent call first" in (watched.folder / f"asked {rank}").read_text()
        assert (watched.folder / f"mine {rank}").read_text() == ""
        assert (watched.folder / f"alarm {rank}").exists()


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_of_seconds_starts_nothing(jobs, value):
    done = jobs.run("print('started')", opening="", HVDTRAIN_STALL_SECONDS=value)
    assert done.returncode == 2
    assert done.stdout == b""
    assert "HVDTRAIN_STALL_SECONDS must be a number of seconds, 0 for never." in done.stderr


def test_a_rank_that_asks_for_patience_may_write_before_it_ends(jobs, watch):
    """With so little patience of the launcher's own, what takes long is possible only because a rank has asked."""
    hasty = "from hvdtrain.launch.supervision import job; from hvdtrain.cli import main; "
    hasty += "job.AFTER_SIGNAL = 1; main()"
    leave_pids = jobs.leave_pids.strip().replace("\n", "; ")
    between = f"""
    if step == 1: signal.signal(signal.SIGTERM, lambda *_: finish())
    if step == 1 and rank == 1: heartbeat.ask_patience(60)
    if step == 2: {leave_pids}
    while step == 3 and not asked: time.sleep(0.1)

asked = []
def finish():
    asked.append(True)
    end = time.monotonic() + 4  # longer than ranks have that did not ask
    while time.monotonic() < end: pass
    Path(f"saved {{rank}}").touch()
"""
    watched = watch(between, launch=[sys.executable, "-c", hasty, "run"])
    jobs.pids(2)
    watched.process.send_signal(signal.SIGTERM)
    watched.end()
    assert [(watched.folder / f"saved {rank}").exists() for rank in range(2)] == [True, True], watched.text


def test_ranks_that_were_preempted_end_together_with_a_code_of_their_own(jobs):
    script = "from hvdtrain.stop_request import Preempted\nraise Preempted('stopped at step 5')"
    done = jobs.run(script)
    assert done.returncode == 75
    assert "stopped at step 5" in done.stderr
    assert "Traceback" not in done.stderr


TRAINING = """
import os, signal, sys
import numpy as np, keras
import hvdtrain.keras as hvd

hvd.init()
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(4, name="first"), keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")

from hvdtrain.collectives.engine import Engine

leave, steps = Engine.leave_to_core, []

def stop(engine):  # all ranks have agreed, the rest is left to Horovod's core
    leave(engine)
    steps.append(engine)
    if hvd.rank() == 1 and len(steps) == 7:
        os.kill(os.getpid(), signal.SIGSTOP)

class Stop(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if sys.argv[1] == "mpi" and (hvd.rank(), model.optimizer.iterations.numpy()) == (1, 6):
            os.kill(os.getpid(), signal.SIGSTOP)

Engine.leave_to_core = stop
data = hvd.shard((np.ones((64, 8), "float32"), np.ones((64, 1), "float32")), batch_size=8)
model.fit(data, epochs=3, verbose=0, callbacks=[Stop()])
"""
BUILT = pytest.mark.skipif(not importlib.util.find_spec("horovod"), reason="Horovod is not built")


@pytest.mark.parametrize("engine", ["mpi", pytest.param("horovod", marks=BUILT)])
def test_in_training_the_reduction_and_the_step_are_named(jobs, engine):
    process = jobs.start(
        TRAINING,
        engine,
        opening="",
        HVDTRAIN_ENGINE=engine,
        HVDTRAIN_STALL_SECONDS="2",
        TF_CPP_MIN_LOG_LEVEL="2",
    )
    watched = Watched(process, jobs.folder)
    text = watched.hear("The stacks of all ranks are in")
    assert "hvdtrain: rank 0 waits in allreduce of sequential/first/kernel and 3 more (Distributed" in text
    assert "at step 7 for " in text
    where = "at step 7" if engine == "mpi" else "in allreduce of sequential/first/kernel and 3 more"
    assert f"; rank 1 is {where}" in text
    assert ", stopped (SIGSTOP): " in text
    os.kill(stopped(text), signal.SIGCONT)
    assert watched.end() == 0, watched.text
