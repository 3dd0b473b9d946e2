"""What each node of a job must have: CPUs, memory and GPUs."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from hvdtrain.batch.partitions import Node, Partition
from hvdtrain.batch.quantities import mebibytes
from hvdtrain.batch.sbatch_command import Batch
from hvdtrain.doctor.finding import Finding, wrong


@dataclass(frozen=True)
class Need:
    """One thing of which a node must have enough.

    Args:
        name: What it is.
        amount: How much of it.
        told: How much, in words.
        has: How much of it a job may have of a node.
        mend: What to type where a node has no more than so much.
    """

    name: str
    amount: float
    told: str
    has: Callable[[Node], float]
    mend: Callable[[float], str]

    def missed(self, partition: Partition, nodes: int) -> Finding:
        """Says that a partition has too few nodes with so much."""
        best = sorted((self.has(node) for node in partition.nodes), reverse=True)[nodes - 1]
        whose = "a node" if nodes == 1 else f"each of {nodes} nodes"
        found = f"{self.told} are asked for, and {whose} of partition {partition.name} has {best:g} at most."
        return wrong(self.name, found, self.mend(best))


def needs(batch: Batch, partition: Partition, all_of_them: Mapping[str, Partition]) -> Iterator[Need]:
    """Lists what each node must have.

    Args:
        batch: The job.
        partition: Where it shall run; its limits hold as well as what its nodes have.
        all_of_them: Where else it might.
    """
    yield _gpus(*batch.gpus, all_of_them)
    ranks, each = batch.ranks, batch.number("cpus-per-task", 1)
    yield _cpus(ranks, each, partition.most("MaxCPUsPerNode"))
    mem = mebibytes(batch.options.get("mem") or "0") or 0
    of_cpus = mebibytes(batch.options.get("mem-per-cpu") or "0") or 0
    yield _memory(max(mem, of_cpus * ranks * each), partition.max_memory)


def _cpus(ranks: int, each: int, limit: float) -> Need:
    def mend(best: float) -> str:
        if ranks <= best:
            return f"--cpus-per-task={best // ranks:g}"
        return f"--ntasks-per-node={best:g} --cpus-per-task=1"

    told = f"{ranks * each} CPUs a node ({ranks} x {each})"
    return Need("CPUs", ranks * each, told, lambda node: min(node.cpus, limit), mend)


def _memory(asked: float, limit: float) -> Need:
    told = f"{math.ceil(asked)} MiB of memory a node"
    return Need(
        "memory", asked, told, lambda node: min(node.memory, limit), lambda best: f"--mem={best:.0f}M"
    )


def _gpus(kind: str, count: int, all_of_them: Mapping[str, Partition]) -> Need:
    def mend(best: float) -> str:
        if best:
            return f"--gpus-per-node={kind}{':' if kind else ''}{best:g}"
        having = [
            name for name, each in all_of_them.items() if any(node.gpus(kind) >= count for node in each.nodes)
        ]
        return f"--partition={having[0]}" if having else "sinfo -o '%P %G' shows which there are"

    told = f"{count} GPU(s){f' of kind {kind}' if kind else ''} a node"
    return Need("GPUs", count, told, lambda node: node.gpus(kind), mend)
