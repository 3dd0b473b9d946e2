"""Check that scripts written for one process give the same results on several ranks, or are rejected."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.horovod_build.wheel import lenient_settings
from hvdtrain.launch.start_plan import clean_environ

pytestmark = pytest.mark.jobs

HERE = Path(__file__).parent
ALL = sorted(path.stem for path in (HERE / "scripts").glob("*.py"))
# The kinds of models whose work is divided in different ways.
ON_FOUR = ["added_losses", "crossentropy", "gan", "random_numbers", "vision"]
# What added_losses.py names of the losses that need whole batches.
WHOLE = ("abs_of_mean", "limit", "mixed", "spread", "zero")
if os.environ.get("HVDTRAIN_TESTS") != "full":  # what fits into minutes
    ON_FOUR = ["gan", "random_numbers"]
    WHOLE = ("mixed",)
    ALL = [
        "added_losses",
        "commands",
        "crossentropy",
        "folders",
        "gan",
        "mixed_precision",
        "mixing",
        "random_numbers",
        "recommender",
        "tabular",
        "vision",
    ]
LAUNCH = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "run", "--wrap"]
# Sums in another order differ by their last bits; in float16 these are worth more, and may turn a prediction.
# Scripts that compute in float64 agree to nearly all digits; the others, in float32, to 2e-5.
TOLERANCE = {"mixed_precision": 2e-2, "added_losses": 1e-10, "crossentropy": 1e-10}


def run(*command, folder=None, **environ) -> subprocess.CompletedProcess:
    settings = {"HVDTRAIN_ENGINE": "mpi", "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"} | environ
    return subprocess.run(
        [str(word) for word in command],
        env=clean_environ(os.environ) | lenient_settings() | settings,
        cwd=folder,
        capture_output=True,
        text=True,
    )


def results(ranks: int, names: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """Runs scripts in one process, or on several ranks; returns each script's numbers by where they stand."""
    start = [*LAUNCH, "-np", str(ranks)] if ranks > 1 else [sys.executable]
    folder.mkdir()
    ended = run(*start, HERE / "all_scripts.py", *names, FOLDER=str(folder))
    assert ended.returncode == 0, ended.stderr[-4000:]
    lines = [
        line.split(" ", 1) for line in ended.stdout.splitlines() if line.startswith(("SCRIPT ", "RESULT "))
    ]
    assert [text for kind, text in lines if kind == "SCRIPT"] == names, "a script did not print once"
    (folder / "said").write_text(ended.stderr)
    found = [json.loads(text) for kind, text in lines if kind == "RESULT"]
    return dict(zip(names, map(dict, map(numbers, found)), strict=True))


def numbers(value, place=""):
    if isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(each, f"{place}/{name}")
    else:
        yield place, value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("wrap")


@pytest.fixture(scope="module")
def alone(folder):
    return results(1, ALL, folder / "1")


@pytest.fixture(scope="module")
def two(folder):
    return results(2, ALL, folder / "2")


@pytest.fixture(scope="module")
def four(folder):
    return results(4, ON_FOUR, folder / "4")


def assert_same(name, alone, many):
    tolerance = TOLERANCE.get(name, 2e-5)
    assert len(alone[name]) > 1
    assert alone[name].keys() == many[name].keys()
    for place, value in alone[name].items():
        received = many[name][place]
        assert math.isclose(received, value, rel_tol=tolerance, abs_tol=tolerance * 0.1), (
            place,
            value,
            received,
        )


@pytest.mark.parametrize("name", ALL)
def test_two_ranks_give_what_one_process_gives(name, alone, two):
    assert_same(name, alone, two)


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks_give_what_one_process_gives(name, alone, four):
    assert_same(name, alone, four)


def test_only_models_that_look_at_several_rows_are_computed_whole(folder, two):
    said = re.findall(
        r"the model (\S+) (.+), so every rank computes whole", (folder / "2" / "said").read_text()
    )
    assert said.count(("recommender_net", "looks at several rows of a batch at once")) == 1
    # Of mixing.py: the endpoint, the mixup, and the moving average.
    assert len([name for name, _ in said if not name.startswith("whole_")]) == 4
    losses = sorted(
        name for name, why in said if why.startswith("has a loss that is neither a mean nor a sum")
    )
    assert losses == [f"whole_{what}" for what in WHOLE]


def test_files_are_those_of_one_process(folder, alone, two):
    def names(ranks):
        return sorted(str(path.relative_to(folder / ranks)) for path in (folder / ranks).rglob("*"))

    board = [name for name in names("2") if name.startswith("board/")]
    assert len(board) == 1, "only rank 0 writes events"
    assert [each for each in names("2") if each not in board] == [
        each for each in names("1") if not each.startswith("board/")
    ]
    for name in ("log.csv", "notes.txt", "moved.txt", "numbers.tfrecord"):
        one, other = ((folder / ranks / name).read_bytes().splitlines() for ranks in ("1", "2"))
        assert len(one) == len(other)


JOB = """
import argparse, logging, os, random, sys
import numpy as np
random.seed(1), np.random.seed(1)
from tensorflow import keras
import neighbour

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int)
    epochs = parser.parse_args().epochs
    print("begins", __file__ == sys.argv[0], os.path.basename(os.getcwd()))
    logging.warning("logged once")
    model = keras.Sequential([keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile("sgd", "mse")
    history = model.fit(*neighbour.data(), epochs=epochs, callbacks=[neighbour.Speaker()], verbose=2)
    print(type(history).__name__, history.epoch, sorted(history.history), model.optimizer.name)
    print("drawn", random.random(), np.random.random())
    os.write(2, b"said natively\\n")
    with open("kept.txt", "a") as file:
        file.write("line\\n")
    kind = type(keras.models.load_model(neighbour.saved(model)).optimizer)
    print(kind.__module__, kind.__name__)
    sys.exit(epochs)
"""
NEIGHBOUR = """
import keras, numpy as np

def data():
    x = np.linspace(0, 1, 36, dtype="float32").reshape(12, 3)
    return x, x.sum(1)

def saved(model):
    model.save("model.keras")
    return "model.keras"

class Speaker(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        print(f"spoken {epoch} {logs['loss']:.4f}")
        if epoch == 1 and self.params["epochs"] > 3:
            raise KeyError("by a callback")
"""


@pytest.fixture
def job(tmp_path):
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    (tmp_path / "job.py").write_text(JOB)
    return tmp_path


def test_output_exit_code_and_files_are_those_of_one_process(job):
    one = run(sys.executable, "job.py", "--epochs", "3", folder=job)
    saved = [path.name for path in job.iterdir() if path.name != "__pycache__"]
    many = run(*LAUNCH, "-np", "2", "job.py", "--epochs", "3", folder=job)
    assert (one.returncode, many.returncode) == (3, 3)

    def said(ended):
        return [line for line in ended.stdout.splitlines() if "ms/step" not in line and "s/step" not in line]

    assert said(one) == said(many)
    assert many.stderr.count("logged once") == many.stderr.count("said natively") == 1
    assert (job / "kept.txt").read_text() == "line\n" * 2
    assert sorted(saved) == sorted(path.name for path in job.iterdir() if path.name != "__pycache__")


SCALED = """
import sys
import keras, numpy as np
from keras import layers

x = np.random.default_rng(0).normal(size=(80, 3)).astype("float32")
y = x @ np.array([1.0, 2.0, 3.0], "float32")
model = keras.Sequential([keras.Input((3,)), layers.Dense(1, kernel_initializer="zeros")])
model.compile(keras.optimizers.SGD(0.02), "mse")
TWIN

def batches():
    while True:
        for start in range(0, 80, 8):
            yield x[start : start + 8], y[start : start + 8]

first = model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, callbacks=CALLBACKS, verbose=0)
print("RESULT", first.params["steps"], *first.history["loss"], float(model.optimizer.learning_rate))
if "twin" not in sys.argv:
    second = model.fit(batches(), epochs=1, steps_per_epoch=10, verbose=0)
    print("RESULT", second.params["steps"], float(model.optimizer.learning_rate))
"""
WARM_UP = """
class WarmUp(keras.callbacks.Callback):
    step = 0
    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = 0.02 * min(self.step / 5 + 1, 2)
        self.step += 1
"""


def test_scaled_batches_are_those_of_the_ranks_together_at_a_rate_that_rises(tmp_path):
    """The twin has the batch of both ranks and the rates of Goyal et al.: 1 to 2 times over the first 5 steps."""
    script, twin = tmp_path / "scaled.py", tmp_path / "twin.py"
    script.write_text(SCALED.replace("TWIN", "").replace("BATCH", "8").replace("CALLBACKS", "None"))
    twin.write_text(SCALED.replace("TWIN", WARM_UP).replace("BATCH", "16").replace("CALLBACKS", "WarmUp()"))
    expected = run(sys.executable, twin, "twin", folder=tmp_path)
    ended = run(*LAUNCH, "--scale-batch", "-np", "2", script, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    first, second = ([float(each) for each in line.split()[1:]] for line in ended.stdout.splitlines())
    assert first == pytest.approx([float(each) for each in expected.stdout.split()[1:]], rel=1e-5)
    assert second == pytest.approx([5, 0.04])
    assert ended.stderr.count("2 times its learning rate (0.04), reached after 1 epoch of warm-up") == 1


def test_a_rate_that_cannot_be_scaled_is_refused(job):
    source = (job / "job.py").read_text()
    plan = 'keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 9)), "mse"'
    (job / "job.py").write_text(source.replace('"sgd", "mse"', plan))
    ended = run(*LAUNCH, "--scale-batch", "-np", "2", "job.py", "--epochs", "3", folder=job)
    assert ended.returncode == 1
    assert "comes from CosineDecay, which cannot be set" in ended.stderr


def test_the_last_words_of_a_rank_that_is_killed_are_shown(tmp_path):
    (tmp_path / "aborts.py").write_text(
        "import os, signal\n"
        "if '1' in map(os.environ.get, ['OMPI_COMM_WORLD_RANK', 'PMI_RANK']):\n"
        "    os.write(2, b'what(): bad_alloc\\n'), os.abort()\n"
        "signal.pause()\n"
    )
    ended = run(*LAUNCH, "-np", "2", "aborts.py", folder=tmp_path)
    assert ended.returncode
    assert "what(): bad_alloc" in ended.stderr and "was killed by signal 6 (SIGABRT)" in ended.stderr


@pytest.mark.smoke
def test_an_error_ends_the_job_with_its_traceback(job):
    ended = run(*LAUNCH, "-np", "2", "job.py", "--epochs", "4", folder=job)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("KeyError: 'by a callback'")
    assert "line 16, in on_epoch_end" in ended.stderr and "model_fit.py" not in ended.stderr
    assert not (job / "kept.txt").exists()


BEGINNING = """
import tensorflow as tf, keras, threading, numpy as np
x = np.ones((8, 3), "float32")
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
def fit():
    model.fit(x, x[:, 0], verbose=0)
def loop():
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    keras.optimizers.SGD().apply_gradients(zip(gradients, model.trainable_variables))
"""
REFUSED = {
    "a loop of its own": ("loop()", "SGD.apply is called outside of model.fit"),
    "a compiled loop": ("tf.function(loop)()", "hvd.DistributedOptimizer"),
    "a strategy": (
        "tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'])",
        "the script makes a MirroredStrategy",
    ),
    "a distribution": ("keras.distribution.set_distribution(None)", "keras.distribution"),
    "hvdtrain": ("import hvdtrain.keras", "Start it without --wrap: hvdtrain run -np"),
    "horovod": ("import horovod.tensorflow.keras", "hvdtrain run --as-horovod"),
}


ROWS = """
class Rows(keras.layers.Layer):
    seen = []
    def call(self, x):
        Rows.seen.append(x.shape[0])
        return x
for strategy in (tf.distribute.MirroredStrategy(), tf.distribute.OneDeviceStrategy(device="/cpu:0")):
    with strategy.scope():
        assert strategy.num_replicas_in_sync == 1
        eager = keras.Sequential([keras.Input((3,)), Rows(), keras.layers.Dense(1)])
        eager.compile("sgd", "mse", run_eagerly=True)
eager.fit(x, x[:, 0], batch_size=8, verbose=0)
print("ROWS", Rows.seen[-1])
"""


def test_each_refusal_is_a_sentence_and_nothing_is_trained(tmp_path):
    attempts = [
        f"try:\n    {code}\nexcept (RuntimeError, ImportError) as error:\n    print('REFUSED', *str(error).split())"
        for code, _ in REFUSED.values()
    ]
    (tmp_path / "refused.py").write_text(
        BEGINNING
        + "before = model.get_weights()\n"
        + "\n".join(attempts)
        + "\nassert all((a == b).all() for a, b in zip(before, model.get_weights()))\n"
        + ROWS
        + "loop()\n"
    )
    ended = run(*LAUNCH, "-np", "2", "refused.py", folder=tmp_path)
    *said, rows = ended.stdout.splitlines()
    assert rows == "ROWS 4", "each rank computes half a batch of 8"
    for line, (what, (_, sentence)) in zip(said, REFUSED.items(), strict=True):
        assert sentence in line, what
    assert ended.returncode == 1
    assert "Nothing was updated." in ended.stderr
    for name in ("MirroredStrategy", "OneDeviceStrategy"):
        assert ended.stderr.count(f"{name} has one device on each rank, and is taken as no strategy.") == 1


def test_what_cannot_be_saved_is_an_error_of_all_ranks_and_one_rank_alone_ends_all(tmp_path):
    (tmp_path / "saves.py").write_text(
        BEGINNING
        + "import os\n"
        + "class Saves(keras.callbacks.Callback):\n"
        + "    def on_epoch_end(self, epoch, logs=None):\n"
        + "        self.model.save('gone/away.txt')\n"
        + "try:\n    model.fit(x, x[:, 0], callbacks=[Saves()], verbose=0)\n"
        + "except ValueError as error:\n    print('CAUGHT', error)\n"
        + "fit()\nprint('went on')\n"
        + "if '1' in map(os.environ.get, ['OMPI_COMM_WORLD_RANK', 'PMI_RANK']):\n    raise KeyError('of rank 1')\n"
        + "fit()\nprint('too far')\n"
    )
    ended = run(*LAUNCH, "-np", "2", "saves.py", folder=tmp_path)
    assert ended.stdout.startswith("CAUGHT Invalid filepath extension")
    assert ended.stdout.endswith("went on\n")
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("KeyError: 'of rank 1'")


def test_fit_in_threads_ends_the_job(tmp_path):
    (tmp_path / "threads.py").write_text(
        BEGINNING
        + "threads = [threading.Thread(target=fit) for _ in range(2)]\n"
        + "[each.start() for each in threads]\n[each.join() for each in threads]\nprint('went on')\n"
    )
    ended = run(*LAUNCH, "-np", "2", "threads.py", folder=tmp_path)
    assert ended.returncode == 1
    assert "went on" not in ended.stdout
    assert "model.fit is called in the thread Thread-" in ended.stderr
