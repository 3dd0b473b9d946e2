"""Jobs with `hvd.callbacks.Checkpoint` that are really killed, stopped and started again."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from hvdtrain.horovod_build.wheel import lenient_settings
from hvdtrain.launch.start_plan import clean_environ

pytestmark = pytest.mark.jobs

LAUNCH = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "run", "-np"]
SCRIPT = """
import json, os, signal, sys, time, zlib
from pathlib import Path
import keras, numpy as np
import hvdtrain.keras as hvd

hvd.init()
keras.utils.set_random_seed(3)
random = np.random.default_rng(0)
x = random.standard_normal((80, 6)).astype("float32")
y = x.sum(axis=1, keepdims=True)
model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), "mse", metrics=["mae"])

class Disturb(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        if os.environ.get("KILL") == f"{hvd.rank()} {step}":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("WAIT") and step == 12:
            Path(os.environ["WAIT"]).touch()
            while os.environ["WAIT"]:  # until somebody asks it to stop
                time.sleep(0.01)
                os.environ["WAIT"] *= not hvdtrain.stop_request.asked()

import hvdtrain.stop_request
stops = keras.callbacks.EarlyStopping("loss", patience=9)
checkpoint = hvd.callbacks.Checkpoint(sys.argv[1], every_steps=5)
callbacks = hvd.callbacks.distributed([stops, Disturb(), checkpoint])
history = model.fit(hvd.shard((x, y), 8), epochs=3, verbose=0, callbacks=callbacks).history
weights = zlib.crc32(b"".join(each.numpy().tobytes() for each in model.weights))
print("RESULT", weights, json.dumps(history))
"""


class Jobs:
    def __init__(self, folder):
        self.folder = folder
        (folder / "train.py").write_text(SCRIPT)

    def start(self, np, directory, **environ):
        own = {"HVDTRAIN_ENGINE": "mpi", "OMP_NUM_THREADS": "1", **environ}
        return subprocess.Popen(
            [*LAUNCH, str(np), "train.py", directory],
            cwd=self.folder,
            env=clean_environ(os.environ) | lenient_settings() | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, np, directory, **environ):
        with ended(self.start(np, directory, **environ)) as job:
            out, err = job.communicate()
            return (
                job.returncode,
                next((each for each in out.splitlines() if each.startswith("RESULT")), None),
                err,
            )


@contextlib.contextmanager
def ended(job):
    try:
        yield job
    finally:
        job.terminate()
        job.communicate()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def undisturbed(jobs):
    code, result, err = jobs.run(2, "undisturbed")
    assert code == 0, err
    return result


def loss(result):
    return float(result.partition('"loss": [')[2].partition("]")[0].split(", ")[-1])


def test_a_killed_rank_costs_nothing(jobs, undisturbed):
    code, _, err = jobs.run(2, "killed", KILL="1 17")
    assert code == 128 + signal.SIGKILL and "rank 1 of 2" in err
    shutil.copytree(jobs.folder / "killed", jobs.folder / "on one rank")
    code, result, err = jobs.run(2, "killed")
    assert (code, result) == (0, undisturbed)
    assert "/killed/step-000000015: epoch 2, step 5 of 10 (step 15 in all)" in err
    code, result, err = jobs.run(1, "on one rank")
    assert code == 0 and "written by 2 ranks" in err
    # The order of sums is another, the samples of each step are the same.
    assert loss(result) == pytest.approx(loss(undisturbed), rel=1e-4)


def test_two_jobs_one_directory_and_a_signal(jobs, undisturbed):
    flag = jobs.folder / "waits"
    with ended(jobs.start(2, "shared", WAIT=str(flag))) as job:
        while not flag.exists():
            assert job.poll() is None, job.communicate()
            time.sleep(0.05)
        code, _, err = jobs.run(2, "shared")
        assert code == 1
        assert "/shared is in use by process" in err and "its own directory" in err
        job.send_signal(signal.SIGUSR1)
        _, err = job.communicate()
        assert job.returncode == 75
        assert "SIGUSR1 asked it to" in err and "goes on from there" in err
    code, result, err = jobs.run(2, "shared")
    assert (code, result) == (0, undisturbed), err
