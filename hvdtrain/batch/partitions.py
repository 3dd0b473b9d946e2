"""What Slurm says of its partitions and nodes: the limits against which a job is held before it waits for hours."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hvdtrain.batch.quantities import ENDLESS, gpus, mebibytes, minutes
from hvdtrain.doctor.program import run_program

SECONDS = 60  # a busy controller answers late

_OUT_OF_ORDER = re.compile(r"down|drain|fail|error|unknown|.*\*")


@dataclass(frozen=True)
class Node:
    """A node: its CPUs, its memory in MiB, its generic resources, and its state in Slurm's words."""

    name: str
    cpus: int
    memory: float
    resources: str
    state: str

    @property
    def usable(self) -> bool:
        """Whether jobs start there, now or after others."""
        return not _OUT_OF_ORDER.match(self.state.lower())

    def gpus(self, kind: str) -> int:
        """How many GPUs it has; of one kind, where one is named."""
        told = [gpus(each) for each in re.split(r",(?![^(]*\))", self.resources)]
        return sum(count for name, count in told if not kind or name in ("", kind))


@dataclass(frozen=True)
class Partition:
    """A partition, as `scontrol show partition` describes it, and its nodes."""

    name: str
    facts: Mapping[str, str]
    nodes: tuple[Node, ...]

    @property
    def max_minutes(self) -> float:
        """The longest time limit of a job."""
        return _limit(minutes(self.facts.get("MaxTime", "UNLIMITED")))

    @property
    def max_memory(self) -> float:
        """The most MiB that a job may have of a node."""
        return _limit(mebibytes(self.facts.get("MaxMemPerNode", "UNLIMITED"))) or ENDLESS

    def most(self, fact: str) -> float:
        """A limit that counts, such as MaxNodes."""
        said = self.facts.get(fact, "UNLIMITED")
        return int(said) if said.isdigit() else ENDLESS


def read_partitions(environ: Mapping[str, str]) -> dict[str, Partition]:
    """Asks Slurm for all its partitions.

    Returns:
        The partitions by name; none at all where Slurm does not answer.
    """
    told = run_program(["scontrol", "--all", "show", "partition", "--oneliner"], environ, SECONDS)
    listed = run_program(["sinfo", "--all", "-h", "-N", "-o", "%R|%n|%c|%m|%G|%T"], environ, SECONDS)
    nodes: dict[str, dict[str, Node]] = {}
    for line in listed.out.splitlines():
        partition, *facts = line.strip().split("|")
        if len(facts) == 5:
            nodes.setdefault(partition, {})[facts[0]] = _node(*facts)
    described = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in told.out.splitlines()]
    names = [(facts.get("PartitionName", ""), facts) for facts in described]
    return {
        name: Partition(name, facts, tuple(nodes.get(name, {}).values())) for name, facts in names if name
    }


def _node(name: str, cpus: str, memory: str, resources: str, state: str) -> Node:
    digits = re.match(r"\d+", cpus)
    return Node(name, int(digits[0]) if digits else 0, mebibytes(memory.rstrip("+")) or 0, resources, state)


def _limit(number: float | None) -> float:
    return ENDLESS if number is None else number
