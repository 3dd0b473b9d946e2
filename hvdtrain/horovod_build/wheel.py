"""From Horovod's source to a proven wheel: fetch, mend, compile, prove, install.

All is done in one temporary folder. The environment is touched by `install` alone, which comes last.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hvdtrain import safe_path
from hvdtrain.horovod_build.mpi_wrapper import lenient_settings
from hvdtrain.horovod_build.progress import BuildProgress, Steps
from hvdtrain.horovod_build.source_patches import mend
from hvdtrain.horovod_build.target import HOROVOD, PASSED_ON, SDIST_SHA256, CannotBuild, Target

_TOOLS = ("setuptools>=70.1,<81", "wheel", "packaging", "cloudpickle", "psutil", "pyyaml")
_RUNTIME = {"cloudpickle": "cloudpickle", "packaging": "packaging", "psutil": "psutil", "pyyaml": "yaml"}
_PIP = [sys.executable, *safe_path.main_of("pip._internal.cli.main"), "--disable-pip-version-check"]
_PIP += ["--retries", "1", "--timeout", "10"]

_PROOF = """
import horovod.tensorflow as hvd, tensorflow as tf
hvd.init()
total = hvd.allreduce(tf.constant([hvd.rank() + 1.0]), op=hvd.Sum).numpy()[0]
print(f"rank {hvd.rank()} of {hvd.size()} received {total}", flush=True)
"""


def build_wheel(target: Target, folder: Path, steps: Steps, progress: BuildProgress) -> Path:
    """Fetches Horovod's source and compiles it for the target.

    Args:
        target: What to build for.
        folder: An empty folder without spaces in its path.
        steps: Runs the commands.
        progress: Is told the phases.

    Returns:
        The wheel, inside `folder`.

    Raises:
        CannotBuild: A package could not be fetched, or the compiler failed.
    """
    progress.phase("fetching the build tools")
    environ = _build_environment(target, folder)
    _fetch_tools(folder / "tools", steps)
    progress.phase(f"fetching Horovod {HOROVOD}")
    source = fetch_source(folder, steps, environ)
    mend(source, target)
    progress.phase("compiling", measured=True)
    command: list[str | Path] = [_python(folder), "setup.py", "bdist_wheel", "--dist-dir", folder / "dist"]
    steps.run(command, f"Horovod did not compile for {target}.", environ, source)
    return next((folder / "dist").glob("*.whl"))


def fetch_source(folder: Path, steps: Steps, environ: dict[str, str]) -> Path:
    """Fetches and unpacks Horovod's source; pip checks its sha256 before anything of it runs.

    Args:
        folder: The temporary folder of the build.
        steps: Runs the commands.
        environ: The environment of the build, with the tools that reading the source's metadata takes.

    Returns:
        The unpacked source.

    Raises:
        CannotBuild: The index cannot be reached, or serves something else under this name.
    """
    wanted = folder / "horovod.txt"
    wanted.write_text(f"horovod=={HOROVOD} --hash=sha256:{SDIST_SHA256}\n")
    command = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
    try:
        _pip([*command, "-r", wanted, "-d", folder / "sdist"], f"Horovod {HOROVOD}'s source", steps, environ)
    except CannotBuild as error:
        received = re.search(r"Got\s+([0-9a-f]{64})", steps.log.read_text())
        if not received:
            raise
        raise CannotBuild(
            f"Your package index serves another Horovod {HOROVOD} than the one known to build: its sha256 is "
            f"{received.group(1)}, expected was {SDIST_SHA256}. Clear a damaged copy with `pip cache purge`, "
            "or name PyPI's own index: `PIP_INDEX_URL=https://pypi.org/simple hvdtrain build-horovod`."
        ) from error
    shutil.unpack_archive(next((folder / "sdist").iterdir()), folder)
    return folder / f"horovod-{HOROVOD}"


def prove(wheel: Path, target: Target, folder: Path, steps: Steps) -> list[Path]:
    """Lets two ranks sum with the wheel, unpacked beside the environment, before it may be installed.

    Args:
        wheel: The wheel to prove.
        target: What it was built for.
        folder: The temporary folder of the build.
        steps: Runs the commands.

    Returns:
        The wheel, and wheels of those packages Horovod needs that the environment lacks.

    Raises:
        CannotBuild: The two ranks did not start, did not end, or did not get the right sum.
    """
    wheels = [wheel, *_runtime_wheels(folder / "wheels", steps)]
    stage = folder / "stage"
    _pip(["install", "--no-deps", "--no-index", "--target", stage, *wheels], "Horovod's wheel", steps)
    command: list[str | Path] = [target.launcher, "-n", "2", sys.executable, *safe_path.code(_PROOF)]
    failure = f"Horovod was built for {target}, but two ranks could not sum with it; nothing was installed."
    output = steps.run(command, failure, _proof_environment(stage), timeout=180)
    if not all(f"rank {rank} of 2 received 3.0" in output for rank in (0, 1)):
        raise CannotBuild(f"{failure} They printed, where 3.0 was expected twice:\n{output.strip()}", 1)
    return wheels


def install(wheels: list[Path], steps: Steps) -> None:
    """Puts the finished wheels into the environment; they lie on disk, so no index is asked."""
    _pip(["install", "--no-deps", "--no-index", "--force-reinstall", *wheels], "the finished wheel", steps)


def _python(folder: Path) -> Path:
    """Names the interpreter by a path that CMake can hand on: compiler flags break at a space."""
    executable = Path(sys.executable)
    if re.fullmatch(r"[\w./+@=-]+", sys.prefix) or not executable.is_relative_to(sys.prefix):
        return executable
    alias = folder / "environment"
    if not alias.exists():
        alias.symlink_to(sys.prefix)
    return alias / executable.relative_to(sys.prefix)


def _build_environment(target: Target, folder: Path) -> dict[str, str]:
    python = _python(folder)
    wrapper = target.wrapper
    if target.mpi_is_in_environment:
        wrapper = python.parent.parent / wrapper.relative_to(sys.prefix)
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HOROVOD_")}
    environ |= {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    environ |= {"HOROVOD_WITH_MPI": "1", "HOROVOD_WITH_TENSORFLOW": "1", "HOROVOD_WITHOUT_GLOO": "1"}
    environ |= {"HOROVOD_WITHOUT_PYTORCH": "1", "HOROVOD_WITHOUT_MXNET": "1"}
    if target.gpu == "nccl":
        environ |= {"HOROVOD_GPU": "CUDA", "HOROVOD_GPU_OPERATIONS": "NCCL"}
    # MPI's wrapper as the compiler itself: CMake's own search would split its flags at spaces, and may
    # find another MPI first.
    environ |= {"CXX": str(wrapper), "MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}"}
    path = [str(folder / "tools/bin"), str(python.parent), os.environ.get("PATH", os.defpath)]
    environ |= {"PATH": os.pathsep.join(path), "PYTHONPATH": str(folder / "tools")}
    return environ | {"TF_CPP_MIN_LOG_LEVEL": "2"}


def _fetch_tools(folder: Path, steps: Steps) -> None:
    """Puts the build tools into a folder of their own; a suitable CMake on PATH is taken as it is."""
    cmake = _cmake_version()
    suitable = cmake is not None and (3, 13) <= cmake < (4,)
    tools = _TOOLS if suitable else (*_TOOLS, "cmake>=3.13,<4")
    try:
        _pip(["install", "--target", folder, *tools], f"the build tools ({', '.join(tools)})", steps)
    except CannotBuild as error:
        if cmake is None or suitable:
            raise
        raise CannotBuild(
            f"The cmake on PATH is {'.'.join(map(str, cmake))}, Horovod needs 3.13 or a later 3, and none "
            f"could be fetched. Type `pip install 'cmake<4'` and try again.\n{error}"
        ) from error


def _cmake_version() -> tuple[int, ...] | None:
    if not shutil.which("cmake"):
        return None
    told = subprocess.run(["cmake", "--version"], capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"version\s+(\d+)\.(\d+)", told)
    return tuple(map(int, found.groups())) if found else None


def _runtime_wheels(folder: Path, steps: Steps) -> list[Path]:
    lacking = [name for name, module in _RUNTIME.items() if not importlib.util.find_spec(module)]
    if lacking:
        _pip(
            ["wheel", "--no-deps", "-w", folder, *lacking],
            f"what Horovod needs ({', '.join(lacking)})",
            steps,
        )
    return sorted(folder.glob("*.whl"))


def _proof_environment(stage: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(stage), os.environ.get("PYTHONPATH")]))
    quiet = {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"}
    return os.environ | lenient_settings() | quiet | {"PYTHONPATH": path}


def _pip(arguments: list, what: str, steps: Steps, environ: dict[str, str] | None = None) -> None:
    failure = (
        f"pip could not provide {what}; its own words are below. Without a network, set PIP_INDEX_URL to an "
        "index that you can reach, or PIP_FIND_LINKS to a folder with the files, and type "
        "`hvdtrain build-horovod` again."
    )
    steps.run([*_PIP, *arguments], failure, environ, exit_code=2)
