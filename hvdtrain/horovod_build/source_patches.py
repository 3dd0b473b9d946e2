"""What Horovod's last release needs changed to serve a TensorFlow that came after it."""

import json
from pathlib import Path

from hvdtrain.horovod_build.target import RECORD, Target

# TensorFlow no longer ships the XLA headers that this file includes; on CPU it compiles to nothing anyway.
_DROPPED = "horovod/tensorflow/xla_mpi_ops.cc"

# TensorFlow no longer has this function; what it did is now a method of the stream.
_DECLARED = "GpuStreamHandle AsGpuStreamValue(Stream* stream);"
_DEFINED = """
#if HAVE_GPU
GpuStreamHandle stream_executor::gpu::AsGpuStreamValue(Stream* stream) {
  return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream);
}
#endif
"""

# The wheel carries its record, so that pip installs and removes both as one. Relative search paths let a
# cached wheel serve another environment; NCCL's place is the user's own.
_ADDED_TO_CMAKE = """
configure_file("${{PROJECT_SOURCE_DIR}}/{record}" "${{CMAKE_LIBRARY_OUTPUT_DIRECTORY_ROOT}}/{name}" COPYONLY)
set(LIBRARIES_LIE_IN "{rpath}")
if(NCCL_LIBRARIES)
    get_filename_component(NCCL_LIES_IN "${{NCCL_LIBRARIES}}" DIRECTORY)
    list(APPEND LIBRARIES_LIE_IN "${{NCCL_LIES_IN}}")
endif()
set_target_properties(${{TF_TARGET_LIB}} PROPERTIES
    BUILD_WITH_INSTALL_RPATH TRUE INSTALL_RPATH "${{LIBRARIES_LIE_IN}}")
"""


def mend(source: Path, target: Target) -> None:
    """Makes Horovod's source compile, load and move with today's TensorFlow, and carry its record.

    Args:
        source: The unpacked source; changed in place.
        target: What it will be built for.
    """
    (source / RECORD).write_text(json.dumps(target.record(), indent=1))
    _mend_lists(source / "horovod/tensorflow/CMakeLists.txt", target)
    operations = source / "horovod/tensorflow/mpi_ops.cc"
    operations.write_text(operations.read_text().replace(_DECLARED, f"static {_DECLARED}") + _DEFINED)


def _mend_lists(lists: Path, target: Target) -> None:
    kept = [line for line in lists.read_text().splitlines() if _DROPPED not in line]
    rpath = ["$ORIGIN/../../tensorflow"]
    if target.mpi_is_in_environment:
        rpath.append("$ORIGIN/../../../..")
    added = _ADDED_TO_CMAKE.format(record=RECORD, name=Path(RECORD).name, rpath=";".join(rpath))
    lists.write_text("\n".join(kept) + added)
