"""`hvdtrain doctor --patches` lists what is replaced."""

import json
import subprocess
import sys

import pytest

DOCTOR = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "doctor", "--patches"]


@pytest.mark.jobs
@pytest.mark.smoke
def test_the_list_names_functions_modules_and_their_purpose():
    done = subprocess.run([*DOCTOR, "--json"], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    modules = {row["by"] for row in rows if row["replaced"].endswith("TensorFlowTrainer.fit")}
    assert "hvdtrain.keras.patches.model_fit" in modules
    assert all(row["by"].startswith("hvdtrain.") and row["purpose"].endswith(".") for row in rows)
    text = subprocess.run(DOCTOR, capture_output=True, text=True, check=True).stdout
    assert all(row["replaced"] in text and row["purpose"] in text for row in rows)


def test_a_start_that_fails_is_reported(tmp_path, monkeypatch):
    (tmp_path / "keras.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(DOCTOR, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "hvdtrain cannot start here" in done.stderr and "broken" in done.stderr
