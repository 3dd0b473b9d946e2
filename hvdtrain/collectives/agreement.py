"""What the ranks compare before an operation, and the sentence they all get when they do not agree."""

import enum
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from hvdtrain.collectives.ops import Op

Error = TypeVar("Error", bound=BaseException)

# Kinds of calls that say by themselves what is done; any other names a place in the script, or a reducer.
_OPERATIONS = {
    *("allreduce", "grouped_allreduce", "reducescatter", "allgather", "alltoall", "broadcast", "barrier"),
    *("allgather_object", "gather_object", "broadcast_object", "join"),
}


class MismatchError(ValueError):
    """The ranks do not ask for the same thing. Raised on every rank, with the same explanation."""


class Known(enum.Enum):
    """What all ranks know of an error that has been shared among them."""

    ORIGINAL = "raised by the work of this rank"
    REPORTED = "raised because another rank has failed"


def mark(error: Error, known: Known) -> Error:
    """Note that all ranks know of an error. What only reports another rank's must not end the job before that."""
    error.hvdtrain_known = known  # type: ignore[attr-defined]
    return error


def known(error: BaseException) -> Known | None:
    """Return what `mark` has noted, or None for an error of which this rank alone knows."""
    return getattr(error, "hvdtrain_known", None)


@dataclass(frozen=True)
class StandIn:
    """What a rank that has joined must do so that the others can go on: the same operations, with nothing in them.

    Args:
        reduced: Dtype and shape of each array that is reduced, for which zeros are sent.
        gathered: Dtype and later dimensions of each array that is gathered, to which no row is added.
        op: How the reduced are combined; only of a sum or a mean are zeros no part.
        groups: Which of the reduced travel as one, by their indices.
        objects: True if the ranks exchange objects, of which this one gives None.
        native: True if the engine's own graph operations move them, under the names that the call gives.
        eager: True if these run outside a graph.
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
        """True if zeros leave the result as it is."""
        return not self.reduced or self.op in (Op.SUM, Op.AVERAGE)


@dataclass(frozen=True)
class Call:
    """One request to a collective, in words, so that ranks can compare what they ask for.

    Args:
        kind: Name of the operation.
        details: One line for each thing that must be the same on all ranks.
        shown: The same lines as a person should read them, where they hold more than what must be the same.
        stand_in: What a rank that has joined does instead; None where an operation needs every rank.
        farewell: True if nothing is to be done: this rank tells why it leaves the others.
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
        """Where a rank is that waits in this call, as its heartbeat says it: "in allreduce of dense/kernel"."""
        first = "".join((self.shown or self.details)[:1])
        if self.kind in _OPERATIONS:
            return f"in {self.kind} ({first})".replace(" ()", "").encode()
        if not self.shown:
            return f"at {self.kind.partition(' (')[0]}".encode()
        more = f" and {len(self.shown) - 1} more" if len(self.shown) > 1 else ""
        variables = first.partition(": ")[0] + more
        if self.kind.startswith("broadcast"):
            return f"in {self.kind}: {variables}".encode()
        return f"in allreduce of {variables} ({self.kind})".encode()  # a reducer's own name


JOIN = Call("join")


def explained(calls: Sequence[Call], ranks: Sequence[int]) -> str:
    """Say in one message who asked for what, beginning with the first difference between two ranks.

    Args:
        calls: What each member of a process set asked for.
        ranks: The members' ranks in the world.
    """
    other = next((index for index, call in enumerate(calls) if call != calls[0]), 0)
    if other == 0:
        return f"join is not possible during {calls[0].kind}."
    sides = _first_difference(calls[0], calls[other])
    like_first = [ranks[index] for index, call in enumerate(calls) if call == calls[0]]
    unlike = [ranks[index] for index, call in enumerate(calls) if call != calls[0]]
    return (
        f"The ranks do not agree on their next operation ({calls[0].kind}).\n"
        f"  {ranks_text(like_first)}: {sides[0]}\n"
        f"  rank {ranks[other]}: {sides[1]}\n"
        f"  ({ranks_text(unlike)} differ{'s' if len(unlike) == 1 else ''} from rank {ranks[0]}.)\n"
        f"{_advice(calls)}"
    )


def _advice(calls: Sequence[Call]) -> str:
    if JOIN in calls:
        return (
            "A rank that has called join stands in for sums, means, gathers and barriers only: every other "
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


def _first_difference(ours: Call, theirs: Call) -> tuple[str, str]:
    if ours.kind != theirs.kind:
        return ours.kind, theirs.kind
    index = next(
        (i for i, pair in enumerate(zip(ours.details, theirs.details, strict=False)) if pair[0] != pair[1]),
        min(len(ours.details), len(theirs.details)),
    )
    first, second = ((call.shown or call.details)[index:][:1] for call in (ours, theirs))
    return "".join(first) or "nothing more", "".join(second) or "nothing more"


def ranks_text(ranks: Sequence[int]) -> str:
    """Write a list of ranks as people say it: 'rank 3', 'ranks 0-2, 5'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
