"""Read the partitions of a cluster, their limits and their nodes from Slurm."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hvdtrain.batch.quantities import UNLIMITED, gpus, mebibytes, minutes, split_resources
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
        found = [gpus(resource) for resource in split_resources(self.resources)]
        return sum(count for name, count in found if not kind or name in ("", kind))


@dataclass(frozen=True)
class Partition:
    """A partition with its nodes; `facts` are the fields that `scontrol show partition` prints."""

    name: str
    facts: Mapping[str, str]
    nodes: tuple[Node, ...]

    @property
    def max_minutes(self) -> float:
        """The longest time limit of a job, in minutes."""
        return _limit(minutes(self.facts.get("MaxTime", "UNLIMITED")))

    @property
    def max_memory(self) -> float:
        """The most memory that a job may use on a node, in MiB."""
        return _limit(mebibytes(self.facts.get("MaxMemPerNode", "UNLIMITED"))) or UNLIMITED

    def limit(self, name: str) -> float:
        """Return a limit that is a number, such as MaxNodes."""
        value = self.facts.get(name, "UNLIMITED")
        return int(value) if value.isdigit() else UNLIMITED


def read_partitions(environ: Mapping[str, str]) -> dict[str, Partition]:
    """Return all partitions of the cluster.

    Returns:
        The partitions by name; empty if Slurm does not answer.
    """
    partitions = run_program(["scontrol", "--all", "show", "partition", "--oneliner"], environ, SECONDS)
    sinfo = run_program(["sinfo", "--all", "-h", "-N", "-o", "%R|%n|%c|%m|%G|%T"], environ, SECONDS)
    nodes: dict[str, dict[str, Node]] = {}
    for line in sinfo.out.splitlines():
        partition, *facts = line.strip().split("|")
        if len(facts) == 5:
            nodes.setdefault(partition, {})[facts[0]] = _node(*facts)
    found = {}
    for line in partitions.out.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        name = fields.get("PartitionName")
        if name:
            found[name] = Partition(name, fields, tuple(nodes.get(name, {}).values()))
    return found


def _node(name: str, cpus: str, memory: str, resources: str, state: str) -> Node:
    digits = re.match(r"\d+", cpus)
    return Node(name, int(digits[0]) if digits else 0, mebibytes(memory.rstrip("+")) or 0, resources, state)


def _limit(number: float | None) -> float:
    return UNLIMITED if number is None else number
