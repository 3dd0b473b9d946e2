"""Read files in Chrome's trace format, also of processes that were killed, and files of Horovod's core."""

import json
import re
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_SEPARATOR = re.compile(r"[\s,]*")


class TraceError(ValueError):
    """A file is not a readable trace. The message continues a sentence that begins with the name of the file."""


def read_trace(path: Path) -> list[Event]:
    """Read the events of a trace in array form.

    If the writer was killed, the last event may be incomplete or the closing bracket missing; all complete events
    are returned.

    Args:
        path: The file.

    Returns:
        The events, in the order of the file.

    Raises:
        OSError: If the file cannot be read.
        TraceError: If it is empty, is not a trace, or is damaged before its last event.
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
        path: The file that Horovod wrote.
        start: When our file starts, in microseconds since the epoch.
        rows: Number of rows in our file; the rows of Horovod are numbered after them.

    Returns:
        The events with times relative to `start`, each of category "horovod".

    Raises:
        OSError: If the file cannot be read.
        TraceError: If it is not a file of Horovod's core.
    """
    events = read_trace(path) if path.stat().st_size else []
    if not events:
        return []
    args = events[0].get("args", {})
    if "start_time_since_epoch_in_micros" not in args:
        raise TraceError("is not a file of Horovod: it does not say when it starts")
    shift = args["start_time_since_epoch_in_micros"] - start
    return [_converted(event, shift, rows) for event in events if event["ph"] != "M" or event["pid"]]


def _converted(event: Event, shift: float, rows: int) -> Event:
    moved = {**event, "cat": "horovod", "pid": event["pid"] and event["pid"] + rows}
    return moved if event["ph"] == "M" else {**moved, "ts": round(event["ts"] + shift, 3)}


def _checked(event: Any) -> Event:
    if not isinstance(event, dict) or not isinstance(event.get("ph"), str):
        raise TraceError("contains something other than trace events")
    if event["ph"] != "M" and not isinstance(event.get("ts"), int | float):
        raise TraceError("contains an event without a time")
    return {"pid": 0, "tid": 0, **event}  # Horovod omits fields that are 0
