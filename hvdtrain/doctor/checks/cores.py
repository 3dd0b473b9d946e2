"""Cores: how many this process may use, who says so, and what that leaves for a rank."""

import math
from collections.abc import Mapping

from hvdtrain import cores as limits
from hvdtrain.doctor.finding import Finding, note, ok

NAME = "Cores and threads"
THREAD_SETTINGS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


def cores(environ: Mapping[str, str]) -> Finding:
    """Tells how many threads a rank gets on this host."""
    return judge_cores(len(limits.allowed()), limits.quota(), environ)


def judge_cores(affinity: int, quota: float | None, environ: Mapping[str, str]) -> Finding:
    """Judges what the scheduler's mask, the container's quota, Slurm and the user's settings say together.

    Args:
        affinity: How many CPUs the process may run on.
        quota: CPU time in cores that the container grants, None for all of it.
        environ: Where Slurm and the user speak.
    """
    usable = affinity if quota is None else max(1, min(affinity, math.floor(quota)))
    found = (
        f"{_count(usable, 'core')} here, so {_count(usable, 'rank')} with one thread each, or fewer with more"
    )
    if quota is not None and quota < affinity:
        found += f" ({affinity} are visible, but the container grants the time of {quota:g})"
    a_task = environ.get("SLURM_CPUS_PER_TASK", "")
    if a_task.isdigit():
        found += f"; Slurm gives each task {_count(int(a_task), 'CPU')}"
    return _with_settings(found, usable, environ)


def _with_settings(found: str, usable: int, environ: Mapping[str, str]) -> Finding:
    set_here = {name: environ[name] for name in THREAD_SETTINGS if environ.get(name, "").isdigit()}
    named = ", ".join(f"{name}={value}" for name, value in set_here.items())
    if any(int(value) > usable for value in set_here.values()):
        return note(
            NAME, f"{found}. But {named} asks for more than there are.", f"unset {' '.join(set_here)}"
        )
    return ok(NAME, f"{found}; {named} stays as you set it" if named else found)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")
