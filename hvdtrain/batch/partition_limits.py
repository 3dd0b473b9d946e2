"""A job held against the limits of its partition: what Slurm would let wait for ever is said before."""

from collections.abc import Iterator, Mapping

from hvdtrain.batch.node_needs import needs
from hvdtrain.batch.partitions import Node, Partition
from hvdtrain.batch.quantities import ENDLESS, minutes
from hvdtrain.batch.sbatch_command import Batch
from hvdtrain.doctor.finding import Finding, note, ok, wrong


def examine_limits(batch: Batch, partitions: Mapping[str, Partition]) -> list[Finding]:
    """Holds a job against the partition it asks for; of several partitions, one that takes it is enough.

    Args:
        batch: The job.
        partitions: Those that Slurm has.

    Returns:
        What was found.
    """
    if not partitions:
        return [note("partition", "Slurm did not describe its partitions, so no limit was checked.", "sinfo")]
    shown = [name for name, each in partitions.items() if each.facts.get("Hidden") != "YES"]
    asked = batch.options.get("partition")
    default = [name for name, each in partitions.items() if each.facts.get("Default") == "YES"]
    names = asked.split(",") if asked else default
    if not names:
        found = f"This cluster has no default partition; it has {', '.join(shown)}."
        return [wrong("partition", found, f"--partition={shown[0] if shown else '…'}")]
    absent = [name for name in names if name not in partitions]
    if absent:
        found = f"There is no partition {', '.join(absent)}; there is {', '.join(shown)}."
        return [wrong("partition", found, f"--partition={shown[0] if shown else '…'}")]
    judged = [list(_judge(batch, partitions[name], partitions)) for name in names]
    taking = [each for each in judged if not any(finding.status == "wrong" for finding in each)]
    return (taking or judged)[0]


def _judge(batch: Batch, partition: Partition, all_of_them: Mapping[str, Partition]) -> Iterator[Finding]:
    yield from _state(partition)
    yield from _account(batch, partition)
    yield from _time(batch, partition)
    yield from _size(batch, partition, all_of_them)


def _state(partition: Partition) -> Iterator[Finding]:
    state = partition.facts.get("State", "UP")
    if state == "DOWN":
        yield note("partition", f"Partition {partition.name} is down: the job waits until it is up again.")
    elif state != "UP":
        found = f"Partition {partition.name} is in state {state} and takes no jobs."
        yield wrong("partition", found, "--partition=… with another; sinfo shows them")


def _account(batch: Batch, partition: Partition) -> Iterator[Finding]:
    allowed = partition.facts.get("AllowAccounts", "ALL")
    account = batch.options.get("account")
    if allowed != "ALL" and (account or "").lower() not in allowed.lower().split(","):
        found = f"Partition {partition.name} takes jobs of the accounts {allowed}, and "
        found += f"this one is of {account}." if account else "none is named."
        yield wrong("account", found, f"--account={allowed.split(',')[0]}")
    denied = partition.facts.get("DenyAccounts", "").lower().split(",")
    if account and account.lower() in denied:
        found = f"Partition {partition.name} takes no jobs of the account {account}."
        yield wrong("account", found, "sacctmgr show assoc user=$USER format=account,partition,qos")


def _time(batch: Batch, partition: Partition) -> Iterator[Finding]:
    asked = minutes(batch.options.get("time") or "")
    if asked is None or asked <= partition.max_minutes:
        return
    limit = partition.facts["MaxTime"]
    found = f"--time={batch.options['time']} is more than the {limit} that partition {partition.name} allows."
    longer = "" if batch.template.name == "preemptible" else ", with --preemptible to go on after it"
    yield wrong("time", found, f"--time={limit}{longer}")


def _size(batch: Batch, partition: Partition, all_of_them: Mapping[str, Partition]) -> Iterator[Finding]:
    """Whether there are enough nodes, large enough, and enough of those in order."""
    least, most = partition.most("MinNodes"), min(partition.most("MaxNodes"), len(partition.nodes) or ENDLESS)
    if batch.nodes > most:
        found = f"--nodes={batch.nodes} is more than partition {partition.name} gives to a job: {most:g}."
        yield wrong("nodes", found, f"--nodes={most:g}")
        return
    if batch.nodes < least < ENDLESS:
        found = f"Partition {partition.name} takes jobs of {least:g} nodes or more, not of {batch.nodes}."
        yield wrong("nodes", found, f"--nodes={least:g}")
    fitting = list(partition.nodes)
    for need in needs(batch, partition, all_of_them) if fitting else ():
        fitting = [node for node in fitting if need.has(node) >= need.amount]
        if len(fitting) < batch.nodes:
            yield need.missed(partition, batch.nodes)
            return
    if fitting:
        yield _order(batch, partition, fitting)


def _order(batch: Batch, partition: Partition, fitting: list[Node]) -> Finding:
    usable = [node for node in fitting if node.usable]
    told = f"{len(usable)} of {len(partition.nodes)} nodes of {partition.name}"
    if len(usable) >= batch.nodes:
        return ok(
            "partition", f"{told} can run this; it asks for {batch.nodes} with {batch.ranks} rank(s) each"
        )
    broken = ", ".join(f"{node.name} ({node.state})" for node in fitting if not node.usable)
    found = f"Only {told} can start this now: the job waits for {broken[:200]}."
    return note("waiting", found, "sinfo -R says why; shorter is --nodes with fewer")
