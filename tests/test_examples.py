"""The examples do what they say, started as their README says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.launch.start_plan import clean_environ

pytestmark = pytest.mark.jobs

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_digits_are_learned_by_one_model(ranks):
    script = str(ROOT / "keras_examples" / "digits_cnn.py")
    launch = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "run", "-np", str(ranks), script]
    done = subprocess.run(
        [sys.executable, script] if ranks == 1 else launch,
        env=clean_environ(os.environ) | {"HVDTRAIN_ENGINE": "auto" if ranks == 1 else "mpi"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    summary = done.stdout.strip().splitlines()[-1]
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", summary).group(1))
    assert accuracy >= 97 and f"{ranks} ranks" in summary and "weights identical on all ranks" in summary
    assert ("verified at step 1" in done.stderr) == (ranks > 1)


def test_a_batch_that_does_not_divide_is_refused():
    script = str(ROOT / "keras_examples" / "digits_cnn.py")
    launch = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "run", "-np", "2", script]
    done = subprocess.run([*launch, "--global-batch", "63"], capture_output=True, text=True)
    assert done.returncode == 2 and "--global-batch 63 must divide by the 2 ranks" in done.stderr


def test_ways_to_send_less_learn_the_digits():
    script = str(ROOT / "keras_examples" / "slow_network.py")
    launch = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "run", "-np", "2", script]
    environ = clean_environ(os.environ) | {"HVDTRAIN_ENGINE": "mpi"}
    words = ["--epochs", "4", "--ways", "int8,topk,powersgd,LocalSGD,DiLoCo"]
    done = subprocess.run([*launch, *words], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accuracies = dict(re.findall(r"^(\w+) +\| accuracy ([\d.]+)%", done.stdout, re.MULTILINE))
    assert len(accuracies) == 5 and min(map(float, accuracies.values())) > 85, accuracies


def test_an_unknown_way_is_refused():
    script = str(ROOT / "keras_examples" / "slow_network.py")
    done = subprocess.run([sys.executable, script, "--ways", "zip"], capture_output=True, text=True)
    assert (
        done.returncode == 2 and "--ways takes none, int8" in done.stderr and "Received: zip" in done.stderr
    )
