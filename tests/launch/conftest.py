"""Real jobs for the tests of the launcher: each is started as a user would, in a folder of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "run"]

# Ranks that have met once and know their number; what a test adds comes after.
OPENING = """
import os, signal, sys, time
from pathlib import Path
from mpi4py import MPI

world = MPI.COMM_WORLD
rank, size = world.rank, world.size
world.barrier()
"""


class Jobs:
    """Writes scripts into a folder and launches them there."""

    # Leaves the process ids of rank and guard where `pids` finds them, whole.
    leave_pids = """
Path(f"{rank}.part").write_text(f"{os.getpid()} {os.getppid()}")
Path(f"{rank}.part").rename(f"{rank}.pids")
"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    opening = OPENING

    def start(self, script: str, *args, np=2, options=(), opening=OPENING, launch=LAUNCH, command=(), **env):
        (self.folder / "the script.py").write_text(opening + script)
        return subprocess.Popen(
            command or [*launch, "-np", str(np), *options, "the script.py", *args],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, script: str, *args: str, **how) -> subprocess.CompletedProcess:
        process = self.start(script, *args, **how)
        stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr.decode())

    def pids(self, ranks: int) -> list[int]:
        """Waits until every rank has left its process ids."""
        files = [self.folder / f"{rank}.pids" for rank in range(ranks)]
        wait_until(lambda: all(file.exists() for file in files))
        return [int(word) for file in files for word in file.read_text().split()]

    def assert_gone(self, pids: list[int]) -> None:
        wait_until(lambda: not any(self.alive(pid) for pid in pids))

    @staticmethod
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False


def wait_until(happened) -> None:
    """Wait without a limit: the runner of the suite ends what makes no progress."""
    while not happened():
        time.sleep(0.05)


@pytest.fixture
def jobs(tmp_path):
    folder = tmp_path / "my jobs"
    folder.mkdir()
    return Jobs(folder)
