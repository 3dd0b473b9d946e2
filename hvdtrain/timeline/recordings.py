"""Read the recordings of ranks, in Chrome's trace format, align them in time, and convert them to one trace."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_SEPARATOR = re.compile(r"[\s,]*")


class TraceError(ValueError):
    """A file is not a readable trace. The message continues a sentence that begins with the name of the file."""


@dataclass(frozen=True)
class RankTimeline:
    """The recording of one rank."""

    path: Path  # its file
    rank: int  # the rank
    size: int | None  # number of ranks that recorded; None if unknown
    host: str  # the host of the rank
    clock: str  # name of the monotonic clock; ranks with the same clock can compare `on_clock`
    start: float  # time at which the file starts, in microseconds since the epoch
    on_clock: float  # the same time on the monotonic clock, in microseconds
    events: list[Event]  # the events of the file; times are microseconds since its start

    @property
    def end(self) -> float:
        """Time of the last event, in microseconds since the start of the file."""
        return max((event["ts"] for event in self.events if event["ph"] != "M"), default=0.0)

    @property
    def tensors(self) -> dict[int, str]:
        """The name of each row, by its number."""
        named = [event for event in self.events if event.get("name") == "process_name"]
        return {event["pid"]: event["args"]["name"] for event in named}


def path_of(path: str | os.PathLike, rank: int) -> Path:
    """Return the absolute path of a rank's file; that of rank 0 is `path` itself."""
    first = Path(path).absolute()
    return first.with_name(f"{first.stem}.rank{rank}{first.suffix}") if rank else first


def native_path_of(path: Path) -> Path:
    """Return the file in which an engine's own core records, until `Timeline.close` moves its events."""
    return path.with_name(f"{path.stem}.native{path.suffix}")


def files_of_other_ranks(first: Path) -> list[Path]:
    """Return the files that the other ranks wrote beside that of rank 0, in the order of the ranks."""
    pattern = re.compile(rf"{re.escape(first.stem)}\.rank(\d+){re.escape(first.suffix)}")
    paths = list(first.parent.iterdir()) if first.parent.is_dir() else []
    found = {int(match[1]): path for path in paths if (match := pattern.fullmatch(path.name))}
    return [found[rank] for rank in sorted(found)]


def load(path: Path) -> RankTimeline:
    """Read the file of one rank; raise a TraceError if it is not a timeline of hvdtrain or is damaged."""
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


def read_trace(path: Path) -> list[Event]:
    """Read the events of a trace in array form.

    If the writer was killed, the last event may be incomplete or the closing bracket missing; all complete events
    are returned. A file that is empty, no trace, or damaged before its last event raises a TraceError.
    """
    text = path.read_text(encoding="utf-8", errors="replace").strip("\0 \t\r\n")
    if not text:
        raise TraceError("is empty")
    if not text.startswith("["):
        raise TraceError("is not a trace: it does not begin with [")
    events: list[Event] = []
    position, decoder = 1, json.JSONDecoder()
    while True:
        position = _SEPARATOR.match(text, position).end()  # type: ignore[union-attr]  # it matches "" too
        if position == len(text) or text[position] == "]":
            return events
        try:
            event, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            if "\n" in text[position:]:
                raise TraceError(f"is damaged after {len(events)} events") from None
            return events
        events.append(_checked(event))


def native_events(path: Path, start: float, rows: int) -> list[Event]:
    """Read the events that Horovod's core has recorded, converted for one of our own files.

    Args:
        path: The file that Horovod wrote; any other file raises a TraceError.
        start: When our file starts, in microseconds since the epoch; the times become relative to it.
        rows: Number of rows in our file; the rows of Horovod are numbered after them.
    """
    events = read_trace(path) if path.stat().st_size else []
    if not events:
        return []
    args = events[0].get("args", {})
    if "start_time_since_epoch_in_micros" not in args:
        raise TraceError("is not a file of Horovod: it does not say when it starts")
    shift = args["start_time_since_epoch_in_micros"] - start
    converted = []
    for event in events:
        moved = {**event, "cat": "horovod", "pid": event["pid"] and event["pid"] + rows}
        if event["ph"] != "M":
            converted.append({**moved, "ts": round(event["ts"] + shift, 3)})
        elif event["pid"]:
            converted.append(moved)
    return converted


def aligned_starts(timelines: Sequence[RankTimeline]) -> list[float]:
    """Return the start of each recording, in microseconds after the earliest one.

    Ranks of one host share a monotonic clock, so they are aligned to the microsecond. Ranks of different hosts are
    aligned by the time of day, as precisely as the hosts keep it.
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
    """Return the events of a trace, in which the rank begins at `start`, is a process, and has a row per tensor."""
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


def _checked(event: Any) -> Event:
    if not isinstance(event, dict) or not isinstance(event.get("ph"), str):
        raise TraceError("contains something other than trace events")
    if event["ph"] != "M" and not isinstance(event.get("ts"), int | float):
        raise TraceError("contains an event without a time")
    return {"pid": 0, "tid": 0, **event}  # Horovod omits fields that are 0
