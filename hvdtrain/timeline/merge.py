"""Merge the timelines of all ranks, and print for which rank the others wait (`hvdtrain timeline merge`)."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hvdtrain.timeline import recordings
from hvdtrain.timeline.recordings import RankTimeline, TraceError
from hvdtrain.timeline.waiting_times import (
    Slice,
    Waiting,
    is_negotiation,
    is_transfer,
    slices,
    time_in,
    waiting,
)

# A rank is named if the others wait for it for at least this share of the time.
NOTABLE = 0.05


def merge(files: Sequence[str], output: str | None = None) -> int:
    """Merge the ranks' files to one file for Perfetto, and print for which rank the others wait.

    Args:
        files: The ranks' files; or that of rank 0 alone, beside which the others are found.
        output: The file to write; `<stem>.merged<suffix>` beside the first by default.

    Returns:
        0, or 2 if nothing could be merged.
    """
    first = Path(files[0])
    target = Path(output) if output else first.with_name(f"{first.stem}.merged{first.suffix}")
    others = recordings.files_of_other_ranks(first) if len(files) == 1 else map(Path, files[1:])
    paths = [first, *others]
    if target.resolve() in [path.resolve() for path in paths]:
        return _refuse(f"{target} is one of the files to merge; give another name with -o.")
    timelines = _read(paths)
    if len(files) == 1:
        timelines = _of_one_run(timelines)
    if not timelines:
        return _refuse("There is nothing to merge.")
    events = []
    for timeline, start in zip(timelines, recordings.aligned_starts(timelines), strict=True):
        events += recordings.to_trace_events(timeline, start)
    try:
        target.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        return _refuse(f"{target} cannot be written: {error.strerror}.")
    count = sum(event["ph"] != "M" for event in events)
    print(f"Wrote {target}: {count} events of {len(timelines)} rank{'s' if len(timelines) > 1 else ''}.")
    print("To see it, open https://ui.perfetto.dev or chrome://tracing and drop the file there.")
    _report(timelines, Console())
    return 0


def verdict(waits: Mapping[int, Waiting], recorded: float) -> str:
    """Return one sentence on whether a rank keeps the others waiting, in a recording of so many microseconds."""
    rank = max(waits, key=lambda rank: waits[rank].micros)
    worst = waits[rank]
    if worst.times == 0 or worst.micros < NOTABLE * recorded:
        return "No rank keeps the others waiting."
    return (
        f"The others wait for rank {rank}: {_seconds(worst.micros)}, {worst.micros / recorded:.0%} of the time. "
        f"It came last {worst.times} times."
    )


def _read(paths: Sequence[Path]) -> list[RankTimeline]:
    """Read the files, with a warning for each that cannot be read."""
    read: dict[int, RankTimeline] = {}
    for path in paths:
        with _warn_on_error(path):
            timeline = recordings.load(path)
            if timeline.rank in read:
                _warn(f"{path} is of rank {timeline.rank}, as is {read[timeline.rank].path}; it is left out.")
                continue
            read[timeline.rank] = timeline
            # Only a rank that was killed leaves the file of Horovod's core beside its own.
            native = recordings.native_path_of(path)
            with _warn_on_error(native):
                if native.is_file():
                    rows = max(timeline.tensors, default=0)
                    timeline.events.extend(recordings.native_events(native, timeline.start, rows))
    return [read[rank] for rank in sorted(read)]


@contextmanager
def _warn_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _warn(f"{path} cannot be read: {error.strerror}.")
    except TraceError as error:
        _warn(f"{path} {error}; it is left out.")


def _of_one_run(timelines: list[RankTimeline]) -> list[RankTimeline]:
    """Leave out files of an earlier run with more ranks, and name the ranks whose files were not found."""
    size = timelines[0].size if timelines else None
    if size is None:
        return timelines
    for timeline in timelines:
        if timeline.rank >= size:
            _warn(f"{timeline.path} is of another run: {timelines[0].path} is one of {size}. It is left out.")
    missing = sorted(set(range(size)) - {timeline.rank for timeline in timelines})
    if missing:
        _warn(
            f"Not found: rank {', '.join(map(str, missing))}. A rank on another host writes on that host's disk, "
            "unless the path is in a shared folder; and HOROVOD_TIMELINE must be set there too."
        )
    return [timeline for timeline in timelines if timeline.rank < size]


def _report(timelines: Sequence[RankTimeline], console: Console) -> None:
    """Print how each rank spends its time, and for which rank the others wait."""
    found = {each.rank: slices(each.events, each.tensors, each.end) for each in timelines}
    waits = waiting(found)
    table = Table()
    for heading in ("rank", "host", "recorded", "waits for others", "on the wire", "others waited for it"):
        table.add_column(heading, justify="left" if heading == "host" else "right")
    for timeline in timelines:
        table.add_row(*_cells(timeline, found[timeline.rank], waits[timeline.rank]))
    console.print(table)
    for rank, slices_of_rank in found.items():
        unfinished = [each for each in slices_of_rank if not each.ended and not each.native]
        if unfinished:  # the innermost one comes first
            print(
                f"Rank {rank}'s file ends during {unfinished[0].phase} of {unfinished[0].tensor!r}: "
                "the rank was killed there, or is still there."
            )
    if len(timelines) > 1:
        print(verdict(waits, max(map(_recorded, found.values()))))
    if len({timeline.clock for timeline in timelines}) > 1:
        print(
            "The hosts are aligned by the time of day, which may differ between them by milliseconds; "
            "the table does not depend on it."
        )


def _cells(timeline: RankTimeline, slices_of_rank: Sequence[Slice], wait: Waiting) -> tuple[str, ...]:
    recorded = _recorded(slices_of_rank)
    transfer = "not seen"
    if any(map(is_transfer, slices_of_rank)):
        transfer = _share(time_in(slices_of_rank, is_transfer), recorded)
    return (
        str(timeline.rank),
        escape(timeline.host),
        _seconds(recorded),
        _share(time_in(slices_of_rank, is_negotiation), recorded),
        transfer,
        f"{_seconds(wait.micros)}, {wait.times} times",
    )


def _recorded(slices_of_rank: Sequence[Slice]) -> float:
    end = max((slice_.end for slice_ in slices_of_rank), default=0.0)
    return end - min((slice_.start for slice_ in slices_of_rank), default=0.0)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _seconds(micros: float) -> str:
    return f"{micros / 1e6:.2f} s"


def _warn(message: str) -> None:
    print(f"hvdtrain: {message}", file=sys.stderr)


def _refuse(message: str) -> int:
    _warn(message)
    return 2
