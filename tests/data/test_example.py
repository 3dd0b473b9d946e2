"""The example prints the same losses on one process and on two ranks, and counts every image."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.launch.start_plan import clean_environ

pytestmark = pytest.mark.jobs

SCRIPT = str(Path(__file__).parent.parent.parent / "keras_examples" / "sharded_digits.py")


def printed(*command, engine):
    environ = clean_environ(os.environ) | {"HVDTRAIN_ENGINE": engine}
    done = subprocess.run([sys.executable, *command], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = re.search(r"loss of each epoch: (.*)", done.stdout).group(1)
    return [float(each) for each in losses.split()], done.stdout


def test_two_ranks_print_what_one_process_prints():
    alone, _ = printed(SCRIPT, engine="single")
    launch = "from hvdtrain.cli import main; main()"
    losses, said = printed("-c", launch, "run", "-np", "2", SCRIPT, engine="mpi")
    assert len(losses) == 8 and max(abs(a - b) for a, b in zip(alone, losses, strict=True)) <= 1e-4
    assert "2 ranks | 23 steps | 1437 images an epoch: [719, 718]" in said
    assert float(re.search(r"test accuracy ([\d.]+)%", said).group(1)) > 93
