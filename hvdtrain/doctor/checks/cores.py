"""Check how many cores this process may use, what limits them, and how many threads a rank gets."""

import math
from collections.abc import Mapping

from hvdtrain import cores as limits
from hvdtrain.doctor.finding import Finding, note, ok

NAME = "Cores and threads"
THREAD_SETTINGS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


def cores(environ: Mapping[str, str]) -> Finding:
    """Return the number of cores and threads for ranks on this host."""
    return judge_cores(len(limits.allowed()), limits.quota(), environ)


def judge_cores(affinity: int, quota: float | None, environ: Mapping[str, str]) -> Finding:
    """Judge the CPU affinity, the container's quota, Slurm's settings and the user's settings together.

    Args:
        affinity: Number of CPUs on which the process may run.
        quota: CPU time that the container grants, in cores; None without a limit.
        environ: The environment variables, with those of Slurm and the user.
    """
    usable = affinity if quota is None else max(1, min(affinity, math.floor(quota)))
    ranks = f"{_count(usable, 'rank')} with one thread each, or fewer ranks with more"
    found = f"{_count(usable, 'core')} here: {ranks}"
    if quota is not None and quota < affinity:
        found += f" ({affinity} are visible, but the container grants the time of {quota:g})"
    cpus_per_task = environ.get("SLURM_CPUS_PER_TASK", "")
    if cpus_per_task.isdigit():
        found += f"; Slurm gives each task {_count(int(cpus_per_task), 'CPU')}"
    return _with_settings(found, usable, environ)


def _with_settings(found: str, usable: int, environ: Mapping[str, str]) -> Finding:
    settings = {name: environ[name] for name in THREAD_SETTINGS if environ.get(name, "").isdigit()}
    named = ", ".join(f"{name}={value}" for name, value in settings.items())
    if any(int(value) > usable for value in settings.values()):
        problem = f"{found}. But {named} asks for more than there are."
        return note(NAME, problem, f"unset {' '.join(settings)}")
    return ok(NAME, f"{found}; {named} stays as you set it" if named else found)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")
