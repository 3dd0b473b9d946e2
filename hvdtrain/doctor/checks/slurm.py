"""Check whether Slurm is here, whether this is an allocation, and whether srun supports the PMI of this MPI."""

import re
import shutil
from collections.abc import Mapping, Sequence

from hvdtrain.doctor.finding import Finding, note, ok
from hvdtrain.doctor.probe_runner import ProbeRunner
from hvdtrain.launch.launchers.slurm import ANY_PMI

NAME = "Slurm"


def slurm(probes: ProbeRunner) -> Finding:
    """Check that `srun` can start ranks of the MPI that is here."""
    if not shutil.which("srun", path=probes.environ.get("PATH")):
        return ok(NAME, "not here; nothing to check")
    version = probes.run("srun", "--version")
    listed = probes.run("srun", "--mpi=list")
    if listed.code != 0:
        output = listed.last_line or "nothing"
        return note(NAME, f"srun is here, but --mpi=list fails and prints: {output}.", "scontrol ping")
    wanted = probes.launcher.mpi.pmi if probes.launcher else ANY_PMI
    return judge_slurm(version.out.strip(), pmi_types(listed.out + listed.err), wanted, probes.environ)


def pmi_types(text: str) -> list[str]:
    """Parse the output of `srun --mpi=list`: titles, with types after them or on the lines below."""
    bodies = [re.split(r"are\.\.\.|available:|srun:", line)[-1] for line in text.splitlines()]
    return list(dict.fromkeys(re.findall(r"\w+", " ".join(bodies))))


def judge_slurm(
    version: str, offered: Sequence[str], wanted: Sequence[str], environ: Mapping[str, str]
) -> Finding:
    """Judge Slurm for the MPI that is here.

    Args:
        version: The output of `srun --version`.
        offered: The PMI types that srun supports.
        wanted: The PMI types that this MPI supports, the preferred one first.
        environ: The environment variables, of which SLURM_JOB_ID is read.
    """
    job = environ.get("SLURM_JOB_ID")
    place = f"in allocation {job}" if job else "outside an allocation"
    found = f"{version}, {place}; PMI types: {', '.join(offered) or 'none'}"
    fitting = next((kind for kind in wanted if kind in offered), None)
    if fitting is None:
        need = " or ".join(wanted)
        problem = f"{found}. This MPI needs {need}, so ranks that srun starts would each be rank 0 of 1."
        return note(
            NAME,
            problem,
            "hvdtrain run -np N script.py   # in the batch script: it uses mpirun in place of srun",
        )
    return ok(NAME, f"{found}; for this MPI: srun --mpi={fitting}")
