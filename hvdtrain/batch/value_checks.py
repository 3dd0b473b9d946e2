"""Check the values of sbatch's options, and compare the numbers of ranks and GPUs."""

import re
from collections.abc import Iterator

from hvdtrain.batch.quantities import mebibytes, minutes
from hvdtrain.batch.sbatch_command import Batch
from hvdtrain.doctor.finding import Finding, note, ok, wrong

# Options with a number, and its pattern.
_COUNTS = {
    "nodes": r"[1-9]\d*(-[1-9]\d*)?",
    "ntasks": r"[1-9]\d*",
    "ntasks-per-node": r"[1-9]\d*",
    "cpus-per-task": r"[1-9]\d*",
}


def examine_values(batch: Batch) -> Iterator[Finding]:
    """Check the values of the options that sbatch will parse."""
    time, mem = batch.options.get("time"), batch.options.get("mem")
    if time is not None and minutes(time) is None:
        found = f"--time={time} is not a time that Slurm accepts: minutes, hours:minutes:seconds, days-hours."
        yield wrong("time", found, "--time=8:00:00 for eight hours, --time=2-00:00:00 for two days")
    if mem is not None and mebibytes(mem) is None:
        yield wrong(
            "memory", f"--mem={mem} is not an amount that Slurm accepts.", "--mem=32G, the memory of a node"
        )
    for name, pattern in _COUNTS.items():
        value = batch.options.get(name)
        if value is not None and not re.fullmatch(pattern, value):
            yield wrong(name, f"--{name}={value} is not a number of 1 or more.", f"--{name}=2")
    yield from _gpus(batch)
    yield from _stop_signal(batch)


def _gpus(batch: Batch) -> Iterator[Finding]:
    count = batch.gpus[1]
    if not count or batch.template.name == "smoke":
        return
    numbers = f"{batch.ranks} rank(s) and {count} GPU(s) a node"
    fix = f"--ntasks-per-node={count}, or --gpus-per-node={batch.ranks}"
    if batch.ranks > count:
        yield wrong("GPUs", f"There are {numbers}: ranks would share a GPU, which NCCL refuses.", fix)
    elif batch.ranks < count:
        yield note("GPUs", f"There are {numbers}: {count - batch.ranks} GPU(s) would be idle.", fix)
    else:
        yield ok("GPUs", numbers)


def _stop_signal(batch: Batch) -> Iterator[Finding]:
    """Check that the time limit leaves time to train before Slurm sends the signal to stop."""
    notice = re.search(r"@(\d+)", batch.options.get("signal") or "")
    limit = minutes(batch.options.get("time") or "") or float("inf")
    if notice and limit * 60 < 2 * int(notice[1]) + 60:
        found = f"The job is asked to stop {notice[1]} s before the end of --time={batch.options['time']}, "
        found += "so almost no time is left to train."
        yield note("time", found, "a longer --time")
