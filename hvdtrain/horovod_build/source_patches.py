"""Patch the source of Horovod's last release for newer versions of TensorFlow."""

import json
from pathlib import Path

from hvdtrain.horovod_build.target import RECORD, Target

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


def patch_source(source: Path, target: Target) -> None:
    """Patch Horovod's source so that it compiles and loads with current TensorFlow, and add its build record.

    Args:
        source: The unpacked source; changed in place.
        target: The versions for which it will be built.
    """
    (source / RECORD).write_text(json.dumps(target.record(), indent=1))
    _patch_cmake_lists(source / "horovod/tensorflow/CMakeLists.txt", target)
    operations = source / "horovod/tensorflow/mpi_ops.cc"
    operations.write_text(operations.read_text().replace(_DECLARED, f"static {_DECLARED}") + _DEFINED)


def _patch_cmake_lists(lists: Path, target: Target) -> None:
    kept = [line for line in lists.read_text().splitlines() if _DROPPED not in line]
    rpath = ["$ORIGIN/../../tensorflow"]
    if target.mpi_is_in_environment:
        rpath.append("$ORIGIN/../../../..")
    added = _ADDED_TO_CMAKE.format(record=RECORD, name=Path(RECORD).name, rpath=";".join(rpath))
    lists.write_text("\n".join(kept) + added)
