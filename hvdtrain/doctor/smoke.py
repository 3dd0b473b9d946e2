"""`hvdtrain smoke`: what a user runs first on a new machine, in a minute."""

import os
from pathlib import Path

from hvdtrain.launch.run import RunOptions, run
from hvdtrain.launch.start_plan import slots_of_job

_PROBE = Path(__file__).parent / "probes" / "smoke.py"


def smoke(num_proc: int | None = None, hosts: str | None = None) -> int:
    """Starts ranks as `hvdtrain run` does; each sums, checks, times, and trains ten steps.

    Args:
        num_proc: How many ranks; all slots of the scheduler's job, or 2, if not given.
        hosts: Hosts and their slots, as for `hvdtrain run`.

    Returns:
        0 if every sum was right and all ranks hold the same weights; else the code of the rank that failed.
    """
    ranks = num_proc if num_proc is not None else slots_of_job(os.environ) or 2
    return run(RunOptions(ranks, str(_PROBE), hosts=hosts))
