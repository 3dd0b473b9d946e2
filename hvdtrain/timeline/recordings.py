"""What each rank has recorded, read from its file, put on one time and drawn as one trace."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.timeline.recorder import native_path_of
from hvdtrain.timeline.trace_format import Event, TraceError, native_events, read_trace


@dataclass(frozen=True)
class RankTimeline:
    """What one rank has recorded.

    Args:
        path: Its file.
        rank: Its number.
        size: How many ranks recorded; None if it does not say.
        host: Where it ran.
        clock: Ranks with the same clock can compare `on_clock`.
        start: When the file starts, in microseconds since the epoch.
        on_clock: The same moment on the monotonic clock.
        events: What is in the file; times are microseconds since its start.
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
        """Time of the last event."""
        return max((event["ts"] for event in self.events if event["ph"] != "M"), default=0.0)

    @property
    def tensors(self) -> dict[int, str]:
        """The name of each row."""
        return {
            each["pid"]: each["args"]["name"] for each in self.events if each.get("name") == "process_name"
        }


def siblings(first: Path) -> list[Path]:
    """Finds the files that the other ranks wrote beside that of rank 0, in the order of the ranks."""
    pattern = re.compile(rf"{re.escape(first.stem)}\.rank(\d+){re.escape(first.suffix)}")
    names = [path for path in first.parent.iterdir()] if first.parent.is_dir() else []
    found = {int(match[1]): path for path in names if (match := pattern.fullmatch(path.name))}
    return [found[rank] for rank in sorted(found)]


def load(path: Path) -> RankTimeline:
    """Reads one rank's file.

    Args:
        path: The file.

    Returns:
        Its events, and what is needed to compare their times with other ranks'.

    Raises:
        OSError: If the file cannot be read.
        TraceError: If it is not the timeline of a rank, or is damaged.
    """
    head, *events = read_trace(path) or [{}]
    try:
        about = head["args"]
        return RankTimeline(
            path,
            int(about["rank"]),
            about.get("size"),
            str(about["host"]),
            str(about["clock"]),
            float(about["start_time_since_epoch_in_micros"]),
            float(about["start_on_clock_in_micros"]),
            events,
        )
    except (KeyError, TypeError, ValueError):
        raise TraceError("is no timeline of hvdtrain: it does not begin with a rank and a host") from None


def left_by_core(timeline: RankTimeline) -> list[Event]:
    """Reads what Horovod's core had recorded beside a rank's file when the rank was killed.

    Args:
        timeline: What the rank itself recorded.

    Returns:
        Events in the time of `timeline`; none where the rank ended by itself, and has taken them over.

    Raises:
        OSError: If the file cannot be read.
        TraceError: If it is damaged.
    """
    path = native_path_of(timeline.path)
    return native_events(path, timeline.start, max(timeline.tensors, default=0)) if path.is_file() else []


def aligned(timelines: Sequence[RankTimeline]) -> list[float]:
    """Puts all ranks on one time.

    Ranks of one host share a clock that nothing sets, to the microsecond. Between hosts there is only the
    time of day, as good as the hosts keep it.

    Args:
        timelines: What to align.

    Returns:
        When each file starts, in microseconds after the first does.
    """
    reference: dict[str, RankTimeline] = {}
    for timeline in timelines:
        reference.setdefault(timeline.clock, timeline)
    starts = [
        reference[each.clock].start + each.on_clock - reference[each.clock].on_clock for each in timelines
    ]
    return [start - min(starts) for start in starts]


def drawn(timeline: RankTimeline, start: float) -> list[Event]:
    """Draws a rank as a process, and each of its tensors as a row.

    Args:
        timeline: What the rank recorded.
        start: When it begins, in microseconds.

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
    about = [
        _about(process, 0, "process_name", {"name": label}),
        _about(process, 0, "process_sort_index", {"sort_index": timeline.rank}),
    ]
    for (tensor, _), row in rows.items():
        about.append(_about(process, row, "thread_name", {"name": tensors.get(tensor, "cycles")}))
        about.append(_about(process, row, "thread_sort_index", {"sort_index": row}))
    return about + events


def _about(process: int, row: int, name: str, args: Event) -> Event:
    return {"name": name, "ph": "M", "pid": process, "tid": row, "args": args}
