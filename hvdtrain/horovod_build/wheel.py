"""Fetch Horovod's source, patch it, compile it to a wheel, verify the wheel and install it.

All steps work in one temporary folder. Only the last one, `install`, changes the environment.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hvdtrain import safe_path
from hvdtrain.horovod_build.progress import Steps
from hvdtrain.horovod_build.target import HOROVOD, PASSED_ON, RECORD, SDIST_SHA256, CannotBuild, Target

_TOOLS = ("setuptools>=70.1,<81", "wheel", "packaging", "cloudpickle", "psutil", "pyyaml")
_RUNTIME = {"cloudpickle": "cloudpickle", "packaging": "packaging", "psutil": "psutil", "pyyaml": "yaml"}
_PIP = [sys.executable, *safe_path.main_of("pip._internal.cli.main"), "--disable-pip-version-check"]
_PIP += ["--retries", "1", "--timeout", "10"]

_ALLREDUCE = """
import horovod.tensorflow as hvd, tensorflow as tf
hvd.init()
total = hvd.allreduce(tf.constant([hvd.rank() + 1.0]), op=hvd.Sum).numpy()[0]
print(f"rank {hvd.rank()} of {hvd.size()} received {total}", flush=True)
"""

# TensorFlow no longer ships the XLA headers that this file includes; without GPUs the file is empty anyway.
_DROPPED = "horovod/tensorflow/xla_mpi_ops.cc"

# TensorFlow no longer has this function; a method of the stream has replaced it.
_DECLARED = "GpuStreamHandle AsGpuStreamValue(Stream* stream);"
_DEFINED = """
#if HAVE_GPU
GpuStreamHandle stream_executor::gpu::AsGpuStreamValue(Stream* stream) {
  return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream);
}
#endif
"""

# The record is a file of the wheel, so that pip installs and removes both together. Relative search paths make a
# cached wheel usable in another environment; the path of NCCL is absolute, because the user chooses it.
_ADDED_TO_CMAKE = """
configure_file("${{PROJECT_SOURCE_DIR}}/{record}" "${{CMAKE_LIBRARY_OUTPUT_DIRECTORY_ROOT}}/{name}" COPYONLY)
set(LIBRARY_FOLDERS "{rpath}")
if(NCCL_LIBRARIES)
    get_filename_component(NCCL_FOLDER "${{NCCL_LIBRARIES}}" DIRECTORY)
    list(APPEND LIBRARY_FOLDERS "${{NCCL_FOLDER}}")
endif()
set_target_properties(${{TF_TARGET_LIB}} PROPERTIES
    BUILD_WITH_INSTALL_RPATH TRUE INSTALL_RPATH "${{LIBRARY_FOLDERS}}")
"""


def build_wheel(target: Target, folder: Path, steps: Steps) -> Path:
    """Fetch Horovod's source and compile it to a wheel inside `folder`, an empty one without spaces in its path.

    Raises:
        CannotBuild: A package could not be fetched, or the compiler failed.
    """
    steps.phase("fetching the build tools")
    environ = _build_environment(target, folder)
    _fetch_tools(folder / "tools", steps)
    steps.phase(f"fetching Horovod {HOROVOD}")
    source = fetch_source(folder, steps, environ)
    patch_source(source, target)
    steps.phase("compiling", measured=True)
    command: list[str | Path] = [_python(folder), "setup.py", "bdist_wheel", "--dist-dir", folder / "dist"]
    steps.run(command, f"Horovod did not compile for {target}.", environ, source)
    return next((folder / "dist").glob("*.whl"))


def fetch_source(folder: Path, steps: Steps, environ: dict[str, str]) -> Path:
    """Fetch and unpack Horovod's source into `folder`; pip checks its sha256 before any of it is run.

    Raises:
        CannotBuild: The index cannot be reached, or its file has another sha256.
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
            f"Your package index has a different file for Horovod {HOROVOD} than the one tested: its sha256 is "
            f"{received.group(1)}, expected {SDIST_SHA256}. Remove a damaged copy with `pip cache purge`, "
            "or use PyPI's index: `PIP_INDEX_URL=https://pypi.org/simple hvdtrain build-horovod`."
        ) from error
    shutil.unpack_archive(next((folder / "sdist").iterdir()), folder)
    return folder / f"horovod-{HOROVOD}"


def patch_source(source: Path, target: Target) -> None:
    """Patch Horovod's source so that it compiles and loads with current TensorFlow, and add its build record."""
    (source / RECORD).write_text(json.dumps(target.record(), indent=1))
    lists, operations = (source / f"horovod/tensorflow/{name}" for name in ("CMakeLists.txt", "mpi_ops.cc"))
    kept = [line for line in lists.read_text().splitlines() if _DROPPED not in line]
    rpath = ["$ORIGIN/../../tensorflow"]
    if target.mpi_is_in_environment:
        rpath.append("$ORIGIN/../../../..")
    added = _ADDED_TO_CMAKE.format(record=RECORD, name=Path(RECORD).name, rpath=";".join(rpath))
    lists.write_text("\n".join(kept) + added)
    operations.write_text(operations.read_text().replace(_DECLARED, f"static {_DECLARED}") + _DEFINED)


def verify(wheel: Path, target: Target, folder: Path, steps: Steps) -> list[Path]:
    """Check an allreduce of two ranks with the wheel, unpacked outside of the environment.

    Returns:
        The wheel, and wheels of the packages that Horovod needs and the environment lacks.

    Raises:
        CannotBuild: The two ranks did not start, did not end, or did not get the right sum.
    """
    wheels = [wheel, *_runtime_wheels(folder / "wheels", steps)]
    stage = folder / "stage"
    _pip(["install", "--no-deps", "--no-index", "--target", stage, *wheels], "Horovod's wheel", steps)
    command: list[str | Path] = [target.launcher, "-n", "2", sys.executable, *safe_path.code(_ALLREDUCE)]
    failure = f"Horovod was built for {target}, but an allreduce of two ranks failed; nothing was installed."
    path = os.pathsep.join(filter(None, [str(stage), os.environ.get("PYTHONPATH")]))
    environ = {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": path}
    output = steps.run(command, failure, os.environ | lenient_settings() | environ, timeout=180)
    if not all(f"rank {rank} of 2 received 3.0" in output for rank in (0, 1)):
        raise CannotBuild(
            f"{failure} Expected the sum 3.0 on both ranks, but they printed:\n{output.strip()}", 1
        )
    return wheels


def install(wheels: list[Path], steps: Steps) -> None:
    """Install the finished wheels in the environment; pip needs no index for files on disk."""
    _pip(["install", "--no-deps", "--no-index", "--force-reinstall", *wheels], "the finished wheel", steps)


def lenient_settings() -> dict[str, str]:
    """Return variables that allow more ranks than cores, also as root; for verification and tests, not for speed.

    Each MPI reads its own variables and ignores the others.
    """
    settings = {"OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_hwloc_base_binding_policy": "none"}
    settings |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    settings |= {"PRTE_MCA_hwloc_default_binding_policy": "none", "OMPI_MCA_mpi_yield_when_idle": "1"}
    for mpi in ("OMPI", "PRTE"):
        settings |= {f"{mpi}_ALLOW_RUN_AS_ROOT": "1", f"{mpi}_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return settings


def _python(folder: Path) -> Path:
    """Return the interpreter by a path without spaces, because CMake puts it into compiler flags."""
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
    # MPI's wrapper is the compiler itself: CMake's search for MPI would split its flags at spaces, and may
    # find another MPI first.
    environ |= {"CXX": str(wrapper), "MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}"}
    path = [str(folder / "tools/bin"), str(python.parent), os.environ.get("PATH", os.defpath)]
    environ |= {"PATH": os.pathsep.join(path), "PYTHONPATH": str(folder / "tools")}
    return environ | {"TF_CPP_MIN_LOG_LEVEL": "2"}


def _fetch_tools(folder: Path, steps: Steps) -> None:
    """Install the build tools in a separate folder; a suitable CMake on PATH is used."""
    cmake = _cmake_version()
    suitable = cmake is not None and (3, 13) <= cmake < (4,)
    tools = _TOOLS if suitable else (*_TOOLS, "cmake>=3.13,<4")
    try:
        _pip(["install", "--target", folder, *tools], f"the build tools ({', '.join(tools)})", steps)
    except CannotBuild as error:
        if cmake is None or suitable:
            raise
        raise CannotBuild(
            f"The cmake on PATH is {'.'.join(map(str, cmake))}, but Horovod needs 3.13 or a later 3.x, and none "
            f"could be fetched. Type `pip install 'cmake<4'` and try again.\n{error}"
        ) from error


def _cmake_version() -> tuple[int, ...] | None:
    if not shutil.which("cmake"):
        return None
    output = subprocess.run(["cmake", "--version"], capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"version\s+(\d+)\.(\d+)", output)
    return tuple(map(int, found.groups())) if found else None


def _runtime_wheels(folder: Path, steps: Steps) -> list[Path]:
    missing = [name for name, module in _RUNTIME.items() if not importlib.util.find_spec(module)]
    if missing:
        what = f"the packages that Horovod needs ({', '.join(missing)})"
        _pip(["wheel", "--no-deps", "-w", folder, *missing], what, steps)
    return sorted(folder.glob("*.whl"))


def _pip(arguments: list, what: str, steps: Steps, environ: dict[str, str] | None = None) -> None:
    failure = (
        f"pip could not provide {what}; its output is below. Without a network, set PIP_INDEX_URL to an "
        "index that you can reach, or PIP_FIND_LINKS to a folder with the files, and type "
        "`hvdtrain build-horovod` again."
    )
    steps.run([*_PIP, *arguments], failure, environ, exit_code=2)
