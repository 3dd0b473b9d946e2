"""From slices of time to an answer: how much of it a rank waits or sends, and for whom the others wait."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hvdtrain.timeline.trace_format import Event

NEGOTIATE = "NEGOTIATE_"
# Phases in which nothing travels: the ranks agree, data is copied or awaited, buffers are made.
_NOT_ON_THE_WIRE = (NEGOTIATE, "MEMCPY_", "QUEUE", "WAIT_", "ALLOCATE_", "INIT_", "COPY_")
# Ranks never arrive at one instant; to be later by less than this many microseconds is not to be late.
LATE = 1000.0


@dataclass(frozen=True)
class Slice:
    """A phase of one tensor, in microseconds.

    Args:
        tensor: The tensor's name.
        phase: The phase's name.
        start: When it began.
        end: When it ended.
        own: Beginnings and ends of the time in it that no slice within it takes.
        native: True if Horovod's core recorded it.
        ended: False if the recording ended before it.
    """

    tensor: str
    phase: str
    start: float
    end: float
    own: tuple[tuple[float, float], ...]
    native: bool = False
    ended: bool = True


@dataclass(frozen=True)
class Waiting:
    """How long the other ranks waited for one.

    Args:
        times: How often it came last, and late.
        micros: How long another rank waited for it, all times together; the mean of the others.
    """

    times: int = 0
    micros: float = 0.0


@dataclass
class _Running:
    """A slice that has begun and not ended."""

    begin: Event
    since: float
    own: list[tuple[float, float]] = field(default_factory=list)

    def pause(self, now: float) -> None:
        """Ends a stretch of its own time."""
        if now > self.since:
            self.own.append((self.since, now))
        self.since = float("inf")

    def ended(self, names: Mapping[int, str], now: float, at_end: bool = False) -> Slice:
        """Makes the slice of it."""
        self.pause(now)
        return Slice(
            names.get(self.begin["pid"], ""),
            self.begin["name"],
            self.begin["ts"],
            now,
            tuple(self.own),
            self.begin.get("cat") == "horovod",
            not at_end,
        )


def slices(events: Iterable[Event], names: Mapping[int, str], end: float) -> list[Slice]:
    """Pairs the beginnings and ends of a rank's slices.

    Args:
        events: What the rank recorded.
        names: The names of the tensors by their number in the file.
        end: When the recording ended.

    Returns:
        The slices, in the order of their ends; last those that had none, from the innermost.
    """
    rows: dict[tuple[int, int], list[_Running]] = defaultdict(list)
    done: list[Slice] = []
    for event in events:
        if event["ph"] not in ("B", "E"):
            continue
        row = rows[event["pid"], event["tid"]]
        if event["ph"] == "B":
            if row:
                row[-1].pause(event["ts"])
            row.append(_Running(event, event["ts"]))
        elif row:
            done.append(row.pop().ended(names, event["ts"]))
            if row:
                row[-1].since = event["ts"]
    done.extend(each.ended(names, end, at_end=True) for row in rows.values() for each in reversed(row))
    return done


def negotiates(slice_: Slice) -> bool:
    """True where a rank waits until all have come; of what Horovod's core sees of that, only rank 0 records."""
    return slice_.phase.startswith(NEGOTIATE) and not slice_.native


def sends(slice_: Slice) -> bool:
    """True where data is on its way between ranks."""
    return not slice_.phase.startswith(_NOT_ON_THE_WIRE)


def time_in(these: Iterable[Slice], which: Callable[[Slice], bool]) -> float:
    """Adds up the microseconds in which at least one such slice was running, and none within it."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(part for each in these if which(each) for part in each.own):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def waiting(found: Mapping[int, Sequence[Slice]]) -> dict[int, Waiting]:
    """Tells for each rank how long the others waited for it.

    The last rank to come to a negotiation is the one that waits least in it, so no two clocks need agree.

    Args:
        found: For each rank, its slices; the n-th negotiation of a tensor is the same one on all ranks.

    Returns:
        For each rank, what the others waited.
    """
    negotiations: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rank, mine in found.items():
        for each in mine:
            if negotiates(each) and each.ended:
                negotiations[each.tensor][rank].append(each.end - each.start)
    waits = dict.fromkeys(found, Waiting())
    for by_rank in negotiations.values():
        for times in zip(*by_rank.values(), strict=False):
            least = min(times)
            waited = sum(time - least for time in times) / max(len(times) - 1, 1)
            if waited > LATE:
                last = list(by_rank)[times.index(least)]
                waits[last] = Waiting(waits[last].times + 1, waits[last].micros + waited)
    return waits
