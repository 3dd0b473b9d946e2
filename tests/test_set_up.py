"""`scripts/set_up.sh`, which both make targets begin with, on machines that lack what it needs."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts/set_up.sh"
# A Python of another version, as far as the script asks: it prints its version and compares it.
OLD = """#!/bin/sh
case "$2" in
  *print*) echo 3.8 ;;
  *) exit 1 ;;
esac
"""
WITHOUT_VENV = """#!/bin/sh
case "$2" in
  *print*) echo 3.12 ;;
  *ensurepip*) exit 1 ;;
esac
"""


@pytest.fixture
def set_up(tmp_path):
    """Runs a copy of the script in a folder with a space, with nothing on PATH but the tools given."""
    project, tools = tmp_path / "a clone/scripts", tmp_path / "tools"
    project.mkdir(parents=True)
    tools.mkdir()
    shutil.copy(SCRIPT, project)
    for name in ("sh", "dirname", "cat", "rm"):
        (tools / name).symlink_to(shutil.which(name))

    def run(*arguments: str, **pythons: str) -> tuple[int, str]:
        for name, text in pythons.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        command = [tools / "sh", project / SCRIPT.name, *arguments]
        done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True)
        assert not (project.parent / ".venv").exists()
        return done.returncode, done.stdout + done.stderr

    return run


def test_no_python_at_all(set_up):
    code, output = set_up()
    assert code == 2
    assert "needs Python 3.10 to 3.13" in output and "missing" in output and "PYTHON=" in output


def test_python_too_old(set_up):
    code, output = set_up(python3=OLD)
    assert code == 2
    assert "python3 here is 3.8" in output


def test_python_asked_for_is_too_old(set_up):
    code, output = set_up("python3", python3=OLD)
    assert code == 2
    assert "PYTHON=python3 is 3.8" in output


def test_python_asked_for_is_not_there(set_up):
    code, output = set_up("python9")
    assert code == 2
    assert "PYTHON=python9 is not on PATH" in output


def test_a_newer_python_under_its_full_name_is_found_and_its_missing_package_named(set_up):
    code, output = set_up(**{"python3": OLD, "python3.12": WITHOUT_VENV})
    assert code == 2
    assert "apt-get install python3.12-venv" in output


def test_python_asked_for_does_not_run(set_up):
    code, output = set_up("python3", python3="#!/bin/sh\nexit 127\n")
    assert code == 2
    assert "PYTHON=python3 does not run" in output
