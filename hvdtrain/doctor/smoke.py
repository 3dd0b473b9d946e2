"""Run the smoke test on several ranks: `hvdtrain smoke`."""

import os
from pathlib import Path

from hvdtrain.launch.run import RunOptions, run
from hvdtrain.launch.start_plan import slots_of_job

_PROBE = Path(__file__).parent / "probes" / "smoke.py"


def smoke(num_proc: int | None = None, hosts: str | None = None) -> int:
    """Start ranks as `hvdtrain run` does; each times and checks three allreduces and trains ten steps.

    Args:
        num_proc: Number of ranks; by default all slots of the scheduler's job, or 2.
        hosts: Hosts and their slots, as for `hvdtrain run`.

    Returns:
        The exit code: 0 if every sum is right and all ranks hold the same weights, else that of the failed rank.
    """
    ranks = num_proc if num_proc is not None else slots_of_job(os.environ) or 2
    return run(RunOptions(ranks, str(_PROBE), hosts=hosts))
