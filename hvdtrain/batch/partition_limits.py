"""Check a job against the limits and the nodes of its partition; Slurm would let it wait forever."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from hvdtrain.batch.partitions import Node, Partition
from hvdtrain.batch.quantities import UNLIMITED, mebibytes, minutes
from hvdtrain.batch.sbatch_command import Batch
from hvdtrain.doctor.finding import Finding, note, ok, wrong


def examine_limits(batch: Batch, partitions: Mapping[str, Partition]) -> list[Finding]:
    """Check a job against the partition it asks for; of several partitions, one that accepts it is enough.

    Args:
        batch: The job.
        partitions: All partitions of the cluster, by name.

    Returns:
        The findings for the partition, or for the first one that accepts the job.
    """
    if not partitions:
        return [note("partition", "Slurm did not describe its partitions, so no limit was checked.", "sinfo")]
    visible = [name for name, partition in partitions.items() if partition.facts.get("Hidden") != "YES"]
    default = [name for name, partition in partitions.items() if partition.facts.get("Default") == "YES"]
    asked = batch.options.get("partition")
    names = asked.split(",") if asked else default
    fix = f"--partition={visible[0] if visible else '…'}"
    if not names:
        found = f"This cluster has no default partition; it has {', '.join(visible)}."
        return [wrong("partition", found, fix)]
    absent = [name for name in names if name not in partitions]
    if absent:
        found = f"There is no partition {', '.join(absent)}; there is {', '.join(visible)}."
        return [wrong("partition", found, fix)]
    results = [list(_examine(batch, partitions[name], partitions)) for name in names]
    accepting = [findings for findings in results if all(finding.status != "wrong" for finding in findings)]
    return (accepting or results)[0]


def _examine(batch: Batch, partition: Partition, partitions: Mapping[str, Partition]) -> Iterator[Finding]:
    yield from _state(partition)
    yield from _account(batch, partition)
    yield from _time(batch, partition)
    yield from _size(batch, partition, partitions)


def _state(partition: Partition) -> Iterator[Finding]:
    state = partition.facts.get("State", "UP")
    if state == "DOWN":
        yield note("partition", f"Partition {partition.name} is down: the job waits until it is up again.")
    elif state != "UP":
        found = f"Partition {partition.name} is in state {state} and accepts no jobs."
        yield wrong("partition", found, "--partition=… with another one; sinfo lists them")


def _account(batch: Batch, partition: Partition) -> Iterator[Finding]:
    allowed = partition.facts.get("AllowAccounts", "ALL")
    account = batch.options.get("account")
    if allowed != "ALL" and (account or "").lower() not in allowed.lower().split(","):
        found = f"Partition {partition.name} accepts jobs of the accounts {allowed}, and "
        found += f"this job is of {account}." if account else "none is given."
        yield wrong("account", found, f"--account={allowed.split(',')[0]}")
    denied = partition.facts.get("DenyAccounts", "").lower().split(",")
    if account and account.lower() in denied:
        found = f"Partition {partition.name} accepts no jobs of the account {account}."
        yield wrong("account", found, "sacctmgr show assoc user=$USER format=account,partition,qos")


def _time(batch: Batch, partition: Partition) -> Iterator[Finding]:
    asked = minutes(batch.options.get("time") or "")
    if asked is None or asked <= partition.max_minutes:
        return
    limit = partition.facts["MaxTime"]
    found = f"--time={batch.options['time']} is more than the {limit} that partition {partition.name} allows."
    longer = "" if batch.template.name == "preemptible" else ", with --preemptible to continue after it"
    yield wrong("time", found, f"--time={limit}{longer}")


def _size(batch: Batch, partition: Partition, partitions: Mapping[str, Partition]) -> Iterator[Finding]:
    """Check that there are enough nodes, that they are large enough, and that enough of these are usable."""
    least, most = (
        partition.limit("MinNodes"),
        min(partition.limit("MaxNodes"), len(partition.nodes) or UNLIMITED),
    )
    if batch.nodes > most:
        found = f"--nodes={batch.nodes} is more than partition {partition.name} gives to a job: {most:g}."
        yield wrong("nodes", found, f"--nodes={most:g}")
        return
    if batch.nodes < least < UNLIMITED:
        found = f"Partition {partition.name} accepts jobs of {least:g} nodes or more, not of {batch.nodes}."
        yield wrong("nodes", found, f"--nodes={least:g}")
    if not partition.nodes:
        return
    suitable = list(partition.nodes)
    for requirement in _requirements(batch, partition, partitions):
        suitable = [node for node in suitable if requirement.available(node) >= requirement.amount]
        if len(suitable) < batch.nodes:
            yield requirement.unmet(partition, batch.nodes)
            return
    if suitable:
        yield _usable_nodes(batch, partition, suitable)


def _usable_nodes(batch: Batch, partition: Partition, suitable: list[Node]) -> Finding:
    usable = [node for node in suitable if node.usable]
    count = f"{len(usable)} of {len(partition.nodes)} nodes of {partition.name}"
    if len(usable) >= batch.nodes:
        found = f"{count} can run this; it asks for {batch.nodes} with {batch.ranks} rank(s) each"
        return ok("partition", found)
    broken = ", ".join(f"{node.name} ({node.state})" for node in suitable if not node.usable)
    found = f"Only {count} can start this now: the job waits for {broken[:200]}."
    return note("waiting", found, "sinfo -R shows the reason; with fewer --nodes the job may start earlier")


@dataclass(frozen=True)
class _Requirement:
    """A resource of which each node of the job must have a minimum.

    Args:
        name: The resource.
        amount: The minimum.
        description: The minimum as text.
        available: The function that returns how much a job may use on a node.
        fix: The function that returns what to type if the nodes have only a given amount.
    """

    name: str
    amount: float
    description: str
    available: Callable[[Node], float]
    fix: Callable[[float], str]

    def unmet(self, partition: Partition, nodes: int) -> Finding:
        """Return the problem that the partition has too few nodes with the minimum."""
        best = sorted((self.available(node) for node in partition.nodes), reverse=True)[nodes - 1]
        which = "a node" if nodes == 1 else f"each of {nodes} nodes"
        found = f"{self.description} are asked for, and {which} of partition {partition.name} has {best:g} at most."
        return wrong(self.name, found, self.fix(best))


def _requirements(
    batch: Batch, partition: Partition, partitions: Mapping[str, Partition]
) -> Iterator[_Requirement]:
    """Yield what each node of the job must have, within the limits of the partition."""
    yield _gpus(*batch.gpus, partitions)
    ranks, cpus_per_rank = batch.ranks, batch.number("cpus-per-task", 1)
    yield _cpus(ranks, cpus_per_rank, partition.limit("MaxCPUsPerNode"))
    mem = mebibytes(batch.options.get("mem") or "0") or 0
    mem_per_cpu = mebibytes(batch.options.get("mem-per-cpu") or "0") or 0
    yield _memory(max(mem, mem_per_cpu * ranks * cpus_per_rank), partition.max_memory)


def _cpus(ranks: int, cpus_per_rank: int, limit: float) -> _Requirement:
    def fix(best: float) -> str:
        if ranks <= best:
            return f"--cpus-per-task={best // ranks:g}"
        return f"--ntasks-per-node={best:g} --cpus-per-task=1"

    total = ranks * cpus_per_rank
    description = f"{total} CPUs a node ({ranks} x {cpus_per_rank})"
    return _Requirement("CPUs", total, description, lambda node: min(node.cpus, limit), fix)


def _memory(asked: float, limit: float) -> _Requirement:
    def fix(best: float) -> str:
        return f"--mem={best:.0f}M"

    description = f"{math.ceil(asked)} MiB of memory a node"
    return _Requirement("memory", asked, description, lambda node: min(node.memory, limit), fix)


def _gpus(kind: str, count: int, partitions: Mapping[str, Partition]) -> _Requirement:
    def fix(best: float) -> str:
        if best:
            return f"--gpus-per-node={kind}{':' if kind else ''}{best:g}"
        for name, partition in partitions.items():
            if any(node.gpus(kind) >= count for node in partition.nodes):
                return f"--partition={name}"
        return "sinfo -o '%P %G' shows which there are"

    description = f"{count} GPU(s){f' of kind {kind}' if kind else ''} a node"
    return _Requirement("GPUs", count, description, lambda node: node.gpus(kind), fix)
