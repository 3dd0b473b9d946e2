"""Run the command as a user types it, and find processes that it must not leave behind."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BENCH = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "bench"]
MARK = "HVDTRAIN_TEST_MARK"


@pytest.fixture
def marked(monkeypatch):
    """Mark all processes that a test starts; return a function that waits for their end and lists those left."""
    mark = f"{MARK}={uuid.uuid4().hex}"
    monkeypatch.setenv(*mark.split("="))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{HERE}")

    def alive():
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ, state = (folder / "environ").read_bytes(), (folder / "stat").read_text().split()[-50]
            except (OSError, IndexError):
                continue
            if mark.encode() in environ and int(folder.name) != os.getpid() and state != "Z":
                found.append(int(folder.name))
        return found

    def left():
        """Wait until none is left; the runner of the suite ends what waits for too long."""
        while found := alive():
            time.sleep(0.1)
        return found

    left.now = alive
    return left


@pytest.fixture(scope="session")
def command():
    """Return the command that a user types, without its options."""
    return BENCH


@pytest.fixture
def bench(marked, tmp_path):
    """Return a function that runs `hvdtrain bench` in an empty folder."""

    def run(*words, **environ):
        return subprocess.run(
            [*BENCH, *words],
            cwd=tmp_path,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return run
