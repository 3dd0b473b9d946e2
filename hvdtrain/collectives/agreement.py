"""Describe operations so that the ranks can compare them, and explain differences between the ranks."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from hvdtrain.collectives.ops import Op
from hvdtrain.topology import consecutive

# Kinds of calls that name the operation itself; any other kind names a place in the script, or a reducer.
_OPERATIONS = {
    *("allreduce", "grouped_allreduce", "reducescatter", "allgather", "alltoall", "broadcast", "barrier"),
    *("allgather_object", "gather_object", "broadcast_object", "join"),
}


@dataclass(frozen=True)
class StandIn:
    """Operations that a joined rank runs so that the others can continue: the same ones, without data of its own.

    Args:
        reduced: Dtype and shape of each array that is reduced; this rank sends zeros.
        gathered: Dtype and later dimensions of each array that is gathered; this rank adds no row.
        op: Operation of the reductions; zeros leave only a sum or a mean unchanged.
        groups: Indices of the reduced arrays that are sent as one.
        objects: True if the ranks exchange objects; this rank sends None.
        native: True if the engine's own graph operations move the arrays, under the names in the call.
        eager: True if these operations run outside a graph.
    """

    reduced: tuple[tuple[str, tuple[int, ...]], ...] = ()
    gathered: tuple[tuple[str, tuple[int, ...]], ...] = ()
    op: Op = Op.SUM
    groups: tuple[tuple[int, ...], ...] = ()
    objects: bool = False
    native: bool = False
    eager: bool = False

    @property
    def possible(self) -> bool:
        """True if zeros leave the result unchanged."""
        return not self.reduced or self.op in (Op.SUM, Op.AVERAGE)


@dataclass(frozen=True)
class Call:
    """One request for a collective operation, as text, so that the ranks can compare their requests.

    Args:
        kind: Name of the operation.
        details: One line for each property that must be the same on all ranks.
        shown: The same lines as shown to users, if these contain more than what must be the same.
        stand_in: What a rank that has joined does instead; None if the operation needs every rank.
        farewell: True if no operation follows: this rank only reports why it stops.
    """

    kind: str
    details: tuple[str, ...] = ()
    shown: tuple[str, ...] = field(default=(), compare=False)
    stand_in: StandIn | None = field(default=None, compare=False)
    farewell: bool = field(default=False, compare=False)
    digest: int = field(init=False)

    def __post_init__(self) -> None:
        text = "\n".join((self.kind, *self.details)).encode()
        value = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        object.__setattr__(self, "digest", value)

    @functools.cached_property
    def where(self) -> bytes:
        """Position of a rank that waits in this call, for its heartbeat: "in allreduce of dense/kernel"."""
        first = "".join((self.shown or self.details)[:1])
        if self.kind in _OPERATIONS:
            return f"in {self.kind} ({first})".replace(" ()", "").encode()
        if not self.shown:
            return f"at {self.kind.partition(' (')[0]}".encode()
        more = f" and {len(self.shown) - 1} more" if len(self.shown) > 1 else ""
        variables = first.partition(": ")[0] + more
        if self.kind.startswith("broadcast"):
            return f"in {self.kind}: {variables}".encode()
        return f"in allreduce of {variables} ({self.kind})".encode()  # the name of a reducer


JOIN = Call("join")


def explain_mismatch(calls: Sequence[Call], ranks: Sequence[int]) -> str:
    """Write the message that shows which ranks requested what, with the first difference between two ranks.

    Args:
        calls: The call of each member of a process set.
        ranks: The members' ranks in the world.
    """
    other = next((index for index, call in enumerate(calls) if call != calls[0]), 0)
    if other == 0:
        return f"join is not possible during {calls[0].kind}."
    lines = _first_difference(calls[0], calls[other])
    equal = [ranks[index] for index, call in enumerate(calls) if call == calls[0]]
    different = [ranks[index] for index, call in enumerate(calls) if call != calls[0]]
    return (
        f"The ranks do not agree on their next operation ({calls[0].kind}).\n"
        f"  {ranks_text(equal)}: {lines[0]}\n"
        f"  rank {ranks[other]}: {lines[1]}\n"
        f"  ({ranks_text(different)} differ{'s' if len(different) == 1 else ''} from rank {ranks[0]}.)\n"
        f"{_advice(calls)}"
    )


def _advice(calls: Sequence[Call]) -> str:
    if JOIN in calls:
        return (
            "A rank that has called join takes part in sums, means, gathers and barriers only: every other "
            "operation needs all ranks. Move it before the join, or give all ranks the same number of batches."
        )
    if any(call.farewell for call in calls):
        return (
            "The other ranks cannot go on alone. Fix the cause on that rank, which shows its own traceback."
        )
    return (
        "Every rank must run the same operations in the same order on the same model. Look for a condition "
        "on the rank, a layer that is frozen or missing on some ranks, or data that ends earlier on some."
    )


def _first_difference(call: Call, other: Call) -> tuple[str, str]:
    if call.kind != other.kind:
        return call.kind, other.kind
    index = next(
        (i for i, pair in enumerate(zip(call.details, other.details, strict=False)) if pair[0] != pair[1]),
        min(len(call.details), len(other.details)),
    )
    first, second = ((item.shown or item.details)[index:][:1] for item in (call, other))
    return "".join(first) or "nothing more", "".join(second) or "nothing more"


def ranks_text(ranks: Sequence[int]) -> str:
    """Write a list of ranks for a message: 'rank 3', 'ranks 0-2, 5'."""
    runs = consecutive(ranks)
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def root_index(ranks: Sequence[int], root_rank: int, function: str) -> int:
    """Return the index of a rank among those that take part; raise ValueError if it is not one of them."""
    if root_rank not in ranks:
        raise ValueError(
            f"{function}: root_rank must be a rank that takes part: {ranks_text(ranks)}. "
            f"Received: root_rank={root_rank}."
        )
    return ranks.index(root_rank)
