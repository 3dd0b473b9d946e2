"""A module of the working directory never takes the place of Python's own before the script starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain import safe_path
from hvdtrain.doctor.probe_runner import probe_command

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hvdtrain"
SHADOWS = ("json", "token", "random", "types", "queue", "numpy")

SCRIPT = """
import os, sys
print(sys.path, sys.argv, __name__, __file__, __spec__, os.getcwd())
import json, token, numpy
import helper
print(helper.__file__)
"""

RUN = [sys.executable, *safe_path.main_of("hvdtrain.cli"), "run", "-np", "2"]
STARTS = {
    "run": RUN,
    "run --wrap": [*RUN, "--wrap"],
    "run --as-horovod": [*RUN, "--as-horovod"],
    "python -m hvdtrain.wrap": [sys.executable, "-m", "hvdtrain.wrap"],
    "python -m hvdtrain.as_horovod": [sys.executable, "-m", "hvdtrain.as_horovod"],
    "python -m hvdtrain.launch.supervision.rank_main": [
        sys.executable,
        "-m",
        "hvdtrain.launch.supervision.rank_main",
    ],
}


@pytest.fixture
def shadowed(tmp_path):
    """A working directory full of modules that raise, and beside it the folder of a script."""
    working, scripts = tmp_path / "working", tmp_path / "scripts"
    working.mkdir()
    scripts.mkdir()
    for name in SHADOWS:
        (working / f"{name}.py").write_text(f"raise RuntimeError('{name}.py of the working directory')")
    (scripts / "helper.py").write_text("")
    (scripts / "train.py").write_text(SCRIPT)
    return working


def run_in(folder, *command):
    # Variables of Python's own, and a path by which the package is found where it is not installed.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HVDTRAIN_ENGINE": "mpi"}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("start", STARTS)
def test_a_script_elsewhere_sees_what_python_shows_it(shadowed, start):
    plain = run_in(shadowed, sys.executable, "../scripts/train.py", "--epochs", "3")
    assert plain.returncode == 0, plain.stderr
    done = run_in(shadowed, *STARTS[start], "../scripts/train.py", "--epochs", "3")
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stdout.splitlines() if not line.startswith("[1] ")]
    assert ours == plain.stdout.splitlines()


def test_modules_in_the_scripts_own_folder_raise_there_as_with_python(shadowed):
    (shadowed / "train.py").write_text("print('begun')\nimport queue\n")
    plain = run_in(shadowed, sys.executable, "train.py")
    done = run_in(shadowed, *RUN, "train.py")
    assert plain.returncode == done.returncode == 1
    assert "begun" in done.stdout
    assert "RuntimeError: queue.py of the working directory" in done.stderr
    # What stands last is the user's traceback: the line that imports, then the module that raises.
    trace = done.stderr[done.stderr.rindex("Traceback") :]
    assert re.findall(r'File ".*?(\w+\.py)"', trace) == ["train.py", "queue.py"]


@pytest.mark.parametrize("probe", ["mpi", "stack"])
def test_what_doctor_asks_is_answered_there(shadowed, probe):
    done = run_in(shadowed, *probe_command(probe))
    assert done.returncode == 0, done.stderr
    assert '{"mpi4py"' in done.stdout or '"keras": ' in done.stdout


def test_code_gets_its_arguments_and_its_exit_code(shadowed):
    done = run_in(shadowed, sys.executable, *safe_path.code("import json; sys.exit(int(sys.argv[1]))"), "7")
    assert done.returncode == 7


def test_python_is_started_in_no_other_way():
    pattern = re.compile(r'sys\.executable,\s*"-[cm]"|python\S*, "-[cm]"')
    starts = [path.name for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text())]
    assert starts == []
