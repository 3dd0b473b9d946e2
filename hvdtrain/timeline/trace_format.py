"""Chrome's trace format on disk: reading it even where its writer was killed, and Horovod's own kind of it."""

import json
import re
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_BETWEEN = re.compile(r"[\s,]*")


class TraceError(ValueError):
    """A file is no trace that can be read; the message continues a sentence that names the file."""


def read_trace(path: Path) -> list[Event]:
    """Reads the events of a trace in its array form.

    A writer that was killed leaves its last event half written or the closing bracket away; all whole
    events are read then.

    Args:
        path: The file.

    Returns:
        The events, in the order of the file.

    Raises:
        OSError: If the file cannot be read.
        TraceError: If it is empty, no trace, or damaged before its last event.
    """
    text = path.read_text(encoding="utf-8", errors="replace").strip("\0 \t\r\n")
    if not text:
        raise TraceError("is empty")
    if not text.startswith("["):
        raise TraceError("is no trace: it does not begin with [")
    events: list[Event] = []
    at, decoder = 1, json.JSONDecoder()
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if at == len(text) or text[at] == "]":
            return events
        try:
            event, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            if "\n" in text[at:]:
                raise TraceError(f"is damaged after {len(events)} events") from None
            return events
        events.append(_checked(event))


def native_events(path: Path, start: float, rows: int) -> list[Event]:
    """Reads what Horovod's core has recorded, as events for one of our own files.

    Args:
        path: The file that Horovod wrote.
        start: When our file starts, in microseconds since the epoch.
        rows: How many rows our file has; Horovod's are numbered after them.

    Returns:
        The events in our time, each of category "horovod".

    Raises:
        OSError: If the file cannot be read.
        TraceError: If it is no file of Horovod's.
    """
    events = read_trace(path) if path.stat().st_size else []
    if not events:
        return []
    about = events[0].get("args", {})
    if "start_time_since_epoch_in_micros" not in about:
        raise TraceError("is not of Horovod: it does not say when it starts")
    shift = about["start_time_since_epoch_in_micros"] - start
    return [_ours(event, shift, rows) for event in events if event["ph"] != "M" or event["pid"]]


def _ours(event: Event, shift: float, rows: int) -> Event:
    moved = {**event, "cat": "horovod", "pid": event["pid"] and event["pid"] + rows}
    return moved if event["ph"] == "M" else {**moved, "ts": round(event["ts"] + shift, 3)}


def _checked(event: Any) -> Event:
    if not isinstance(event, dict) or not isinstance(event.get("ph"), str):
        raise TraceError("holds something else than the events of a trace")
    if event["ph"] != "M" and not isinstance(event.get("ts"), int | float):
        raise TraceError("holds an event without a time")
    return {"pid": 0, "tid": 0, **event}  # Horovod leaves away what a viewer takes for 0
