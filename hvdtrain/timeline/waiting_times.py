"""Compute how long each rank waits and transfers data, and for which rank the others wait."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hvdtrain.timeline.recordings import Event

NEGOTIATE = "NEGOTIATE_"
# Phases in which no data is transferred: ranks negotiate, data is copied or awaited, buffers are allocated.
_NO_TRANSFER = (NEGOTIATE, "MEMCPY_", "QUEUE", "WAIT_", "ALLOCATE_", "INIT_", "COPY_")
# Ranks never arrive at the same instant: a smaller difference, in microseconds, does not count as late.
LATE = 1000.0


@dataclass
class Slice:
    """A phase of one tensor; all times are in microseconds."""

    tensor: str  # name of the tensor
    phase: str  # name of the phase
    start: float  # time of its beginning
    end: float  # time of its end; that of the whole recording if the slice has none
    native: bool  # whether Horovod's core recorded it
    # Start and end of each interval in it that no nested slice covers.
    own: list[tuple[float, float]] = field(default_factory=list)
    ended: bool = False  # false if the recording ended before it


@dataclass(frozen=True)
class Waiting:
    """Time that the other ranks waited for one rank."""

    times: int = 0  # number of collectives in which it came last and late
    # Microseconds that another rank waited for it in total, as a mean over the other ranks.
    micros: float = 0.0


def slices(events: Iterable[Event], names: Mapping[int, str], end: float) -> list[Slice]:
    """Match the beginnings and ends of a rank's slices.

    Args:
        events: The recorded events of the rank.
        names: Names of the tensors, by their number in the file.
        end: Time at which the recording ended.

    Returns:
        The slices in the order of their ends; slices without an end come last, the innermost first.
    """
    running: dict[tuple[int, int], list[Slice]] = defaultdict(list)
    since: dict[tuple[int, int], float] = {}  # the time up to which the own intervals of a row are known
    done: list[Slice] = []
    for event in events:
        if event["ph"] not in ("B", "E"):
            continue
        key, now = (event["pid"], event["tid"]), event["ts"]
        row = running[key]
        if row and now > since[key]:
            row[-1].own.append((since[key], now))
        since[key] = now
        if event["ph"] == "B":
            native = event.get("cat") == "horovod"
            row.append(Slice(names.get(event["pid"], ""), event["name"], now, end, native))
        elif row:
            row[-1].end, row[-1].ended = now, True
            done.append(row.pop())
    for key, row in running.items():
        if row and end > since[key]:
            row[-1].own.append((since[key], end))
        done.extend(reversed(row))
    return done


def is_negotiation(slice_: Slice) -> bool:
    """Return whether a rank waits in this slice until all ranks have come.

    Negotiations of Horovod's core do not count, because only rank 0 records them.
    """
    return slice_.phase.startswith(NEGOTIATE) and not slice_.native


def is_transfer(slice_: Slice) -> bool:
    """Return whether data is transferred between ranks in this slice."""
    return not slice_.phase.startswith(_NO_TRANSFER)


def time_in(all_slices: Iterable[Slice], included: Callable[[Slice], bool]) -> float:
    """Return the microseconds in which at least one included slice was running, without its nested slices."""
    intervals = [interval for slice_ in all_slices if included(slice_) for interval in slice_.own]
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def waiting(slices_by_rank: Mapping[int, Sequence[Slice]]) -> dict[int, Waiting]:
    """Return for each rank how long the others waited for it.

    The rank that comes last to a negotiation waits least in it, so the clocks of the ranks need not agree. The n-th
    negotiation of a tensor is the same one on all ranks.
    """
    negotiations: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rank, slices_of_rank in slices_by_rank.items():
        for slice_ in slices_of_rank:
            if is_negotiation(slice_) and slice_.ended:
                negotiations[slice_.tensor][rank].append(slice_.end - slice_.start)
    waits = dict.fromkeys(slices_by_rank, Waiting())
    for by_rank in negotiations.values():
        for times in zip(*by_rank.values(), strict=False):
            least = min(times)
            waited = sum(time - least for time in times) / max(len(times) - 1, 1)
            if waited > LATE:
                last = list(by_rank)[times.index(least)]
                waits[last] = Waiting(waits[last].times + 1, waits[last].micros + waited)
    return waits
