"""Slurm: whether it is here, whether this is an allocation, and whether srun speaks this MPI's PMI."""

import re
import shutil
from collections.abc import Mapping, Sequence

from hvdtrain.doctor.finding import Finding, note, ok
from hvdtrain.doctor.inquiry import Inquiry
from hvdtrain.launch.launchers.slurm import ANY_PMI

NAME = "Slurm"


def slurm(inquiry: Inquiry) -> Finding:
    """Checks that `srun` can start ranks of the MPI that is here."""
    if not shutil.which("srun", path=inquiry.environ.get("PATH")):
        return ok(NAME, "not here; nothing to check")
    version = inquiry.ask("srun", "--version")
    listed = inquiry.ask("srun", "--mpi=list")
    if listed.code != 0:
        said = listed.last_line or "nothing"
        return note(NAME, f"srun is here, but --mpi=list fails and says: {said}.", "scontrol ping")
    wanted = inquiry.launcher.mpi.pmi if inquiry.launcher else ANY_PMI
    return judge_slurm(version.out.strip(), pmi_types(listed.out + listed.err), wanted, inquiry.environ)


def pmi_types(text: str) -> list[str]:
    """Reads what `srun --mpi=list` prints: titles, with types behind them or one a line beneath."""
    bodies = [re.split(r"are\.\.\.|available:|srun:", line)[-1] for line in text.splitlines()]
    return list(dict.fromkeys(re.findall(r"\w+", " ".join(bodies))))


def judge_slurm(
    version: str, offered: Sequence[str], wanted: Sequence[str], environ: Mapping[str, str]
) -> Finding:
    """Judges Slurm beside the MPI.

    Args:
        version: What `srun --version` prints.
        offered: The PMI types that srun speaks.
        wanted: Those that this MPI understands, the best first.
        environ: Where an allocation shows itself.
    """
    job = environ.get("SLURM_JOB_ID")
    place = f"in allocation {job}" if job else "outside an allocation"
    found = f"{version}, {place}; PMI types: {', '.join(offered) or 'none'}"
    fitting = next((kind for kind in wanted if kind in offered), None)
    if fitting is None:
        need = " or ".join(wanted)
        said = f"{found}. This MPI needs {need}, so srun would start ranks that are each alone."
        return note(
            NAME,
            said,
            "hvdtrain run -np N script.py   # in the batch script: it takes mpirun in place of srun",
        )
    return ok(NAME, f"{found}; for this MPI: srun --mpi={fitting}")
