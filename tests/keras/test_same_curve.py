"""The same training on 1, 2 and 4 ranks: one loss curve; and on as many ranks again, the same bits."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hvdtrain.horovod_build.wheel import lenient_settings
from hvdtrain.launch.start_plan import clean_environ

pytestmark = pytest.mark.jobs

SCRIPT = str(Path(__file__).parent.parent.parent / "keras_examples" / "same_curve.py")
LAUNCH = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "run"]


def run(*command):
    # The mpi engine adds up in one order, and needs no Horovod.
    environ = clean_environ(os.environ) | lenient_settings() | {"HVDTRAIN_ENGINE": "mpi"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves")

    def of(ranks, *options):
        path = folder / f"{len(list(folder.iterdir()))}-on-{ranks}.json"
        launched = [*LAUNCH, "-np", str(ranks)] if ranks > 1 else [sys.executable]
        run(*launched, SCRIPT, "--save", str(path), *options)
        return path, json.loads(path.read_text())

    return of


def test_the_number_of_ranks_does_not_change_the_curve(curve, capsys):
    curves = {ranks: curve(ranks) for ranks in (1, 2, 4)}
    _, single = curves[1]
    assert len(single["steps"]) == 3 * 29 and single["epochs"][-1] < single["epochs"][0] / 4
    for ranks, (_, found) in curves.items():
        assert found["ranks"] == ranks
        np.testing.assert_allclose(found["steps"], single["steps"], rtol=1e-5)
        np.testing.assert_allclose(found["epochs"], single["epochs"], rtol=1e-5)
    runpy.run_path(SCRIPT)["compare"]([path for path, _ in curves.values()], None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["1 ranks", "2 ranks", "4 ranks"]
    assert "0.0e+00" in lines[0] and single["weights"] in lines[0]


def test_a_repeated_run_is_the_same_to_the_bit(curve):
    """With dropout too: its masks differ between the ranks, and come from the seed."""
    first, second = (curve(2, "--dropout", "0.2")[1] for _ in range(2))
    assert first == second
