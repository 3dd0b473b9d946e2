"""What was asked of sbatch, each value for itself and ranks beside GPUs."""

import re
from collections.abc import Iterator

from hvdtrain.batch.quantities import mebibytes, minutes
from hvdtrain.batch.sbatch_command import Batch
from hvdtrain.doctor.finding import Finding, note, ok, wrong

# Options that count, and what each counts.
_COUNTS = {
    "nodes": r"[1-9]\d*(-[1-9]\d*)?",
    "ntasks": r"[1-9]\d*",
    "ntasks-per-node": r"[1-9]\d*",
    "cpus-per-task": r"[1-9]\d*",
}


def examine_values(batch: Batch) -> Iterator[Finding]:
    """Reads what sbatch will read."""
    time, mem = batch.options.get("time"), batch.options.get("mem")
    if time is not None and minutes(time) is None:
        found = f"--time={time} is no time that Slurm reads: minutes, hours:minutes:seconds, days-hours."
        yield wrong("time", found, "--time=8:00:00 for eight hours, --time=2-00:00:00 for two days")
    if mem is not None and mebibytes(mem) is None:
        yield wrong(
            "memory", f"--mem={mem} is no amount that Slurm reads.", "--mem=32G, the memory of a node"
        )
    for name, pattern in _COUNTS.items():
        value = batch.options.get(name)
        if value is not None and not re.fullmatch(pattern, value):
            yield wrong(name, f"--{name}={value} is no number of 1 or more.", f"--{name}=2")
    yield from _gpus(batch)
    yield from _announcement(batch)


def _gpus(batch: Batch) -> Iterator[Finding]:
    count = batch.gpus[1]
    if not count or batch.template.name == "smoke":
        return
    told = f"{batch.ranks} rank(s) and {count} GPU(s) a node"
    fitting = f"--ntasks-per-node={count}, or --gpus-per-node={batch.ranks}"
    if batch.ranks > count:
        yield wrong("GPUs", f"These are {told}: ranks would share a GPU, which NCCL refuses.", fitting)
    elif batch.ranks < count:
        yield note("GPUs", f"These are {told}: {count - batch.ranks} would idle.", fitting)
    else:
        yield ok("GPUs", told)


def _announcement(batch: Batch) -> Iterator[Finding]:
    """Whether the announcement of the end leaves time for the training before it."""
    told = re.search(r"@(\d+)", batch.options.get("signal") or "")
    limit = minutes(batch.options.get("time") or "") or float("inf")
    if told and limit * 60 < 2 * int(told[1]) + 60:
        found = f"The job is told to stop {told[1]} s before --time={batch.options['time']}: nearly at once."
        yield note("time", found, "--time with more")
