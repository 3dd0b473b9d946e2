"""`hvdtrain smoke` on real ranks."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.jobs

SMOKE = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "smoke"]


def smoke(*options: str, **environ: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2", "HVDTRAIN_ENGINE": "mpi"} | environ
    return subprocess.run([*SMOKE, *options], env=settings, capture_output=True, text=True)


@pytest.mark.smoke
def test_two_ranks_sum_and_train():
    done = smoke()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == [
        f"allreduce of {size}" for size in ("4 KiB", "1 MiB", "32 MiB")
    ]
    assert lines[3].startswith("10 steps of training: the same weights on all ranks")
    assert lines[4].startswith("smoke test passed: 2 ranks on 1 host (")


@pytest.mark.parametrize("options", [["-np", "0"], ["-np", "2", "-H", "localhost:1"]])
def test_what_cannot_start(options):
    done = smoke(*options)
    assert done.returncode == 2 and done.stderr.startswith("hvdtrain: "), done.stderr
