"""Check a job against the limits and the nodes of its partition; Slurm would let it wait forever."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from hvdtrain.batch.sbatch_command import Batch
from hvdtrain.batch.sbatch_options import UNLIMITED, first_number, gpus, mebibytes, minutes
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.program import run_program

SECONDS = 60  # the time limit of a question; a busy controller answers late

_NOT_USABLE = re.compile(r"down|drain|fail|error|unknown|.*\*")


@dataclass(frozen=True)
class Node:
    """A node with its CPUs, its memory in MiB, its generic resources, and its state as Slurm prints it."""

    name: str
    cpus: int
    memory: float
    resources: str
    state: str

    @property
    def usable(self) -> bool:
        """Whether jobs can start there, now or after other jobs."""
        return not _NOT_USABLE.match(self.state.lower())

    def gpus(self, kind: str) -> int:
        """Return the number of its GPUs, of one kind if `kind` is not empty."""
        return gpus(self.resources, kind)[1]


def _count(text: str) -> float | None:
    return int(text) if text.isdigit() else None


@dataclass(frozen=True)
class Partition:
    """A partition with its nodes; `facts` are the fields that `scontrol show partition` prints."""

    name: str
    facts: Mapping[str, str]
    nodes: tuple[Node, ...]

    def limit(self, name: str, parse: Callable[[str], float | None] = _count) -> float:
        """Return a limit; infinity if there is none."""
        number = parse(self.facts.get(name, "UNLIMITED"))
        return UNLIMITED if number is None else number


def read_partitions(environ: Mapping[str, str]) -> dict[str, Partition]:
    """Return all partitions of the cluster by name; none if Slurm does not answer."""
    partitions = run_program(["scontrol", "--all", "show", "partition", "--oneliner"], environ, SECONDS)
    sinfo = run_program(["sinfo", "--all", "-h", "-N", "-o", "%R|%n|%c|%m|%G|%T"], environ, SECONDS)
    nodes: dict[str, dict[str, Node]] = {}
    for line in sinfo.out.splitlines():
        partition, *facts = line.strip().split("|")
        if len(facts) == 5:
            nodes.setdefault(partition, {})[facts[0]] = _read_node(*facts)
    found = {}
    for line in partitions.out.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        name = fields.get("PartitionName")
        if name:
            found[name] = Partition(name, fields, tuple(nodes.get(name, {}).values()))
    return found


def _read_node(name: str, cpus: str, memory: str, resources: str, state: str) -> Node:
    digits = re.match(r"\d+", cpus)
    return Node(name, int(digits[0]) if digits else 0, mebibytes(memory.rstrip("+")) or 0, resources, state)


def examine_limits(batch: Batch, partitions: Mapping[str, Partition]) -> list[Finding]:
    """Check a job against the partition it asks for; of several partitions, one that accepts it is enough.

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
    results = []
    for partition in [partitions[name] for name in names]:
        findings = [*_state(partition), *_account(batch, partition), *_time(batch, partition)]
        results.append([*findings, *_size(batch, partition, partitions)])
    accepting = [findings for findings in results if all(finding.status != "wrong" for finding in findings)]
    return (accepting or results)[0]


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
    if asked is None or asked <= partition.limit("MaxTime", minutes):
        return
    limit = partition.facts["MaxTime"]
    found = f"--time={batch.options['time']} is more than the {limit} that partition {partition.name} allows."
    longer = "" if batch.template.name == "preemptible" else ", with --preemptible to continue after it"
    yield wrong("time", found, f"--time={limit}{longer}")


def _size(batch: Batch, partition: Partition, partitions: Mapping[str, Partition]) -> Iterator[Finding]:
    """Check that the number of nodes is allowed, and that there are enough nodes that are large enough."""
    least = partition.limit("MinNodes")
    most = min(partition.limit("MaxNodes"), len(partition.nodes) or UNLIMITED)
    if batch.nodes > most:
        found = f"--nodes={batch.nodes} is more than partition {partition.name} gives to a job: {most:g}."
        yield wrong("nodes", found, f"--nodes={most:g}")
        return
    if batch.nodes < least < UNLIMITED:
        found = f"Partition {partition.name} accepts jobs of {least:g} nodes or more, not of {batch.nodes}."
        yield wrong("nodes", found, f"--nodes={least:g}")
    if partition.nodes:
        yield _resources(batch, partition, partitions)


def _resources(batch: Batch, partition: Partition, partitions: Mapping[str, Partition]) -> Finding:
    kind, gpu_count = batch.gpus
    cpus_per_rank = first_number(batch.options, "cpus-per-task", 1)
    cpus = batch.ranks * cpus_per_rank
    max_cpus = partition.limit("MaxCPUsPerNode")
    mem_per_cpu = mebibytes(batch.options.get("mem-per-cpu") or "0") or 0
    memory = max(mebibytes(batch.options.get("mem") or "0") or 0, mem_per_cpu * cpus)
    max_memory = partition.limit("MaxMemPerNode", mebibytes) or UNLIMITED
    of_kind = f" of kind {kind}" if kind else ""
    cpus_text = f"{cpus} CPUs a node ({batch.ranks} x {cpus_per_rank})"
    memory_text = f"{math.ceil(memory)} MiB of memory a node"
    # Of each resource: the amount that a node must have, its description, and how much a job may use on a node.
    resources: dict[str, tuple[float, str, Callable[[Node], float]]] = {
        "GPUs": (gpu_count, f"{gpu_count} GPU(s){of_kind} a node", lambda node: node.gpus(kind)),
        "CPUs": (cpus, cpus_text, lambda node: min(node.cpus, max_cpus)),
        "memory": (memory, memory_text, lambda node: min(node.memory, max_memory)),
    }
    suitable = list(partition.nodes)
    for name, (amount, description, available) in resources.items():
        suitable = [node for node in suitable if available(node) >= amount]
        if len(suitable) < batch.nodes:
            best = sorted(map(available, partition.nodes), reverse=True)[batch.nodes - 1]
            which = "a node" if batch.nodes == 1 else f"each of {batch.nodes} nodes"
            found = f"{description} are asked for, and {which} of partition {partition.name} has {best:g} at most."
            return wrong(name, found, _smaller_request(name, best, batch, partitions))
    return _usable_nodes(batch, partition, suitable)


def _smaller_request(name: str, best: float, batch: Batch, partitions: Mapping[str, Partition]) -> str:
    """Return what to type if the nodes of the partition have at most `best` of a resource."""
    if name == "memory":
        return f"--mem={best:.0f}M"
    if name == "CPUs" and batch.ranks <= best:
        return f"--cpus-per-task={best // batch.ranks:g}"
    if name == "CPUs":
        return f"--ntasks-per-node={best:g} --cpus-per-task=1"
    kind, count = batch.gpus
    if best:
        return f"--gpus-per-node={kind}{':' if kind else ''}{best:g}"
    for partition in partitions.values():
        if any(node.gpus(kind) >= count for node in partition.nodes):
            return f"--partition={partition.name}"
    return "sinfo -o '%P %G' shows which there are"


def _usable_nodes(batch: Batch, partition: Partition, suitable: list[Node]) -> Finding:
    usable = [node for node in suitable if node.usable]
    count = f"{len(usable)} of {len(partition.nodes)} nodes of {partition.name}"
    if len(usable) >= batch.nodes:
        found = f"{count} can run this; it asks for {batch.nodes} with {batch.ranks} rank(s) each"
        return ok("partition", found)
    broken = ", ".join(f"{node.name} ({node.state})" for node in suitable if not node.usable)
    found = f"Only {count} can start this now: the job waits for {broken[:200]}."
    return note("waiting", found, "sinfo -R shows the reason; with fewer --nodes the job may start earlier")
