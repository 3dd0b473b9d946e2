"""Old scripts in a folder of their own, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HVDTRAIN_RUN = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "run", "--as-horovod"]
AS_HOROVOD = [sys.executable, "-m", "hvdtrain.as_horovod"]


class Scripts:
    """Writes a script for Horovod and runs it on two ranks, or in one process."""

    as_horovod = AS_HOROVOD

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, text: str, name: str = "old_script.py") -> None:
        (self.folder / name).write_text(text)

    def run(self, text: str, *args: str, start=(*HVDTRAIN_RUN, "-np", "2"), engine="mpi"):
        self.write(text)
        return subprocess.run(
            [*start, "old_script.py", *args],
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "HVDTRAIN_ENGINE": engine,
                "TF_CPP_MIN_LOG_LEVEL": "3",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def alone(self, text: str, *args: str):
        return self.run(text, *args, start=AS_HOROVOD, engine="single")


@pytest.fixture
def scripts(tmp_path):
    return Scripts(tmp_path)
