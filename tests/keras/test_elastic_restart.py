"""A job is killed in the midst of an epoch and started again: it ends as the one that was not killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.launch.start_plan import clean_environ

pytestmark = pytest.mark.jobs

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os, signal, sys
import keras, numpy as np
import hvdtrain.keras as hvd
from hvdtrain.keras import elastic

hvd.init()
random = np.random.default_rng(hvd.rank())
x, y = random.standard_normal((24, 5)).astype("float32"), random.standard_normal((24, 2)).astype("float32")
init = keras.initializers.GlorotUniform(seed=1)
model = keras.Sequential([
    keras.Input((5,)),
    keras.layers.Dense(6, "relu", kernel_initializer=init),
    keras.layers.Dropout(0.3, seed=hvd.rank()),
    keras.layers.Dense(2, kernel_initializer=init),
])
model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), "mse")
state = elastic.KerasState(model, batch=0, epoch=0)


class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        victim, step = int(os.environ.get("VICTIM", -1)), int(os.environ.get("STEP", -1))
        if hvd.rank() == victim and int(model.optimizer.iterations.numpy()) == step:
            os.kill(os.getpid(), signal.SIGKILL)


@elastic.run
def train(state):
    callbacks = [
        elastic.CommitStateCallback(state, batches_per_commit=2),
        elastic.UpdateBatchStateCallback(state),
        elastic.UpdateEpochStateCallback(state),
        Kill(),
    ]
    state.model.fit(x, y, batch_size=4, shuffle=False, initial_epoch=state.epoch, epochs=3, verbose=0,
                    callbacks=callbacks)


train(state)
if hvd.rank() == 0:
    np.savez(sys.argv[1], *[each.numpy() for each in (*model.variables, *model.optimizer.variables)])
"""


class Job:
    """A script in a folder, started with the same arguments each time."""

    def __init__(self, folder, ranks):
        self.folder, self.ranks = folder, ranks
        folder.mkdir()
        (folder / "train.py").write_text(SCRIPT)

    def run(self, **settings):
        run = ["-c", "from hvdtrain.cli import main; main()", "run", "-np", str(self.ranks)]
        return subprocess.run(
            [sys.executable, *(run if self.ranks > 1 else []), "train.py", "end.npz"],
            cwd=self.folder,
            env={
                **clean_environ(os.environ),
                "PYTHONPATH": str(ROOT),
                "HVDTRAIN_ENGINE": "mpi" if self.ranks > 1 else "single",
                **settings,
            },
            capture_output=True,
            text=True,
        )

    @property
    def end(self):
        return (self.folder / "end.npz").read_bytes()

    @property
    def commits(self):
        return list((self.folder / ".hvdtrain_elastic").glob("*.state"))


@pytest.mark.parametrize("ranks, victim", [(1, 0), (2, 0), (2, 1)])
def test_killed_twice_and_still_the_same(tmp_path, ranks, victim):
    """Eighteen steps in three epochs, committed every second; killed after the ninth, and after the fourteenth."""
    whole, killed = Job(tmp_path / "whole", ranks), Job(tmp_path / "killed", ranks)
    done = whole.run()
    assert done.returncode == 0, done.stderr
    for step in ("9", "14"):
        assert killed.run(VICTIM=str(victim), STEP=step).returncode != 0
        assert len(killed.commits) == 1 and not (killed.folder / "end.npz").exists()
    done = killed.run()
    assert done.returncode == 0 and "resuming from the last commit (batch" in done.stderr, done.stderr
    assert killed.end == whole.end
    assert not (killed.folder / ".hvdtrain_elastic").exists()
