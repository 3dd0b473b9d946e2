"""Read the recording of each rank, align the recordings in time, and convert them to one trace."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.timeline.recorder import native_path_of
from hvdtrain.timeline.trace_format import Event, TraceError, native_events, read_trace


@dataclass(frozen=True)
class RankTimeline:
    """The recording of one rank.

    Args:
        path: Its file.
        rank: The rank.
        size: Number of ranks that recorded; None if unknown.
        host: The host of the rank.
        clock: Name of the monotonic clock; ranks with the same clock can compare `on_clock`.
        start: Time at which the file starts, in microseconds since the epoch.
        on_clock: The same time on the monotonic clock, in microseconds.
        events: The events of the file; times are microseconds since its start.
    """

    path: Path
    rank: int
    size: int | None
    host: str
    clock: str
    start: float
    on_clock: float
    events: list[Event]

    @property
    def end(self) -> float:
        """Time of the last event, in microseconds since the start of the file."""
        return max((event["ts"] for event in self.events if event["ph"] != "M"), default=0.0)

    @property
    def tensors(self) -> dict[int, str]:
        """The name of each row, by its number."""
        named = [event for event in self.events if event.get("name") == "process_name"]
        return {event["pid"]: event["args"]["name"] for event in named}


def files_of_other_ranks(first: Path) -> list[Path]:
    """Return the files that the other ranks wrote beside that of rank 0, in the order of the ranks."""
    pattern = re.compile(rf"{re.escape(first.stem)}\.rank(\d+){re.escape(first.suffix)}")
    paths = list(first.parent.iterdir()) if first.parent.is_dir() else []
    found = {int(match[1]): path for path in paths if (match := pattern.fullmatch(path.name))}
    return [found[rank] for rank in sorted(found)]


def load(path: Path) -> RankTimeline:
    """Read the file of one rank.

    Args:
        path: The file.

    Returns:
        Its events, and the clocks to compare their times with those of other ranks.

    Raises:
        OSError: If the file cannot be read.
        TraceError: If it is not the timeline of a rank, or is damaged.
    """
    header, *events = read_trace(path) or [{}]
    try:
        args = header["args"]
        return RankTimeline(
            path,
            int(args["rank"]),
            args.get("size"),
            str(args["host"]),
            str(args["clock"]),
            float(args["start_time_since_epoch_in_micros"]),
            float(args["start_on_clock_in_micros"]),
            events,
        )
    except (KeyError, TypeError, ValueError):
        raise TraceError("is not a timeline of hvdtrain: it does not begin with a rank and a host") from None


def unmoved_native_events(timeline: RankTimeline) -> list[Event]:
    """Read the file of Horovod's core beside a rank's file, which only a rank that was killed leaves there.

    Args:
        timeline: The recording of the rank.

    Returns:
        Events with times relative to the start of `timeline`; none if the rank has moved them into its own file.

    Raises:
        OSError: If the file cannot be read.
        TraceError: If it is damaged.
    """
    path = native_path_of(timeline.path)
    return native_events(path, timeline.start, max(timeline.tensors, default=0)) if path.is_file() else []


def aligned_starts(timelines: Sequence[RankTimeline]) -> list[float]:
    """Return the start of each recording on a common time axis.

    Ranks of one host share a monotonic clock, so they are aligned to the microsecond. Ranks of different hosts are
    aligned by the time of day, as precisely as the hosts keep it.

    Args:
        timelines: The recordings.

    Returns:
        The start of each recording, in microseconds after the earliest one.
    """
    references: dict[str, RankTimeline] = {}
    for timeline in timelines:
        references.setdefault(timeline.clock, timeline)
    starts = []
    for timeline in timelines:
        reference = references[timeline.clock]
        starts.append(reference.start + timeline.on_clock - reference.on_clock)
    return [start - min(starts) for start in starts]


def to_trace_events(timeline: RankTimeline, start: float) -> list[Event]:
    """Convert a recording to a trace in which the rank is a process and each of its tensors a row.

    Args:
        timeline: The recording.
        start: Its start on the time axis of the trace, in microseconds.

    Returns:
        Chrome's trace events.
    """
    process, tensors = timeline.rank, timeline.tensors
    rows: dict[tuple[int, int], int] = {}
    events: list[Event] = []
    for event in timeline.events:
        if event["ph"] != "M":
            row = rows.setdefault((event["pid"], event["tid"]), len(rows) + 1)
            events.append({**event, "pid": process, "tid": row, "ts": round(event["ts"] + start, 3)})
    label = f"rank {timeline.rank} ({timeline.host})"
    names = [
        _metadata(process, 0, "process_name", {"name": label}),
        _metadata(process, 0, "process_sort_index", {"sort_index": timeline.rank}),
    ]
    for (tensor, _), row in rows.items():
        names.append(_metadata(process, row, "thread_name", {"name": tensors.get(tensor, "cycles")}))
        names.append(_metadata(process, row, "thread_sort_index", {"sort_index": row}))
    return names + events


def _metadata(process: int, row: int, name: str, args: Event) -> Event:
    return {"name": name, "ph": "M", "pid": process, "tid": row, "args": args}
