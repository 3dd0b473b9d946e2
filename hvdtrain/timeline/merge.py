"""`hvdtrain timeline merge`: the ranks' timelines as one, and for which rank the others wait."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hvdtrain.timeline.recorder import native_path_of
from hvdtrain.timeline.recordings import RankTimeline, aligned, drawn, left_by_core, load, siblings
from hvdtrain.timeline.trace_format import TraceError
from hvdtrain.timeline.waiting_times import Slice, Waiting, negotiates, sends, slices, time_in, waiting

# From this share of the time on, waiting is worth a look.
NOTABLE = 0.05


def merge(files: Sequence[str], output: str | None = None) -> int:
    """Makes one file for Perfetto of the ranks' files, and says for which rank the others wait.

    Args:
        files: The ranks' files; or that of rank 0 alone, beside which the others are found.
        output: Where to write; `<stem>.merged<suffix>` beside the first by default.

    Returns:
        0, or 2 when nothing could be merged.
    """
    first = Path(files[0])
    target = Path(output) if output else first.with_name(f"{first.stem}.merged{first.suffix}")
    paths = [Path(name) for name in files] if len(files) > 1 else [first, *siblings(first)]
    if target.resolve() in [path.resolve() for path in paths]:
        return _refused(f"{target} is one of the files to merge; give another name with -o.")
    timelines = _read(paths)
    if len(files) == 1:
        timelines = _of_its_run(timelines)
    if not timelines:
        return _refused("There is nothing to merge.")
    events = [
        event
        for timeline, start in zip(timelines, aligned(timelines), strict=True)
        for event in drawn(timeline, start)
    ]
    try:
        target.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        return _refused(f"{target} cannot be written: {error.strerror}.")
    count = sum(event["ph"] != "M" for event in events)
    print(f"Wrote {target}: {count} events of {len(timelines)} rank{'s' if len(timelines) > 1 else ''}.")
    print("To see it, open https://ui.perfetto.dev or chrome://tracing and drop the file there.")
    _report(timelines, Console())
    return 0


def verdict(waits: Mapping[int, Waiting], recorded: float) -> str:
    """Says in one sentence whether a rank keeps the others waiting.

    Args:
        waits: How long the others waited for each rank.
        recorded: How many microseconds were recorded.
    """
    rank = max(waits, key=lambda each: waits[each].micros)
    worst = waits[rank]
    if worst.times == 0 or worst.micros < NOTABLE * recorded:
        return "No rank keeps the others waiting."
    return (
        f"The others wait for rank {rank}: {_seconds(worst.micros)}, {worst.micros / recorded:.0%} of the time. "
        f"It came last {worst.times} times."
    )


def _read(paths: Sequence[Path]) -> list[RankTimeline]:
    """Reads what can be read, and names what cannot."""
    read: dict[int, RankTimeline] = {}
    for path in paths:
        with _named_if_bad(path):
            timeline = load(path)
            if timeline.rank in read:
                _warn(f"{path} is of rank {timeline.rank}, as is {read[timeline.rank].path}; it is left out.")
                continue
            read[timeline.rank] = timeline
            with _named_if_bad(native_path_of(path)):
                timeline.events.extend(left_by_core(timeline))
    return [read[rank] for rank in sorted(read)]


@contextmanager
def _named_if_bad(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _warn(f"{path} cannot be read: {error.strerror}.")
    except TraceError as error:
        _warn(f"{path} {error}; it is left out.")


def _of_its_run(timelines: list[RankTimeline]) -> list[RankTimeline]:
    """Leaves out what an earlier run with more ranks has left beside, and says which ranks' files are not here."""
    size = timelines[0].size if timelines else None
    if size is None:
        return timelines
    for each in timelines:
        if each.rank >= size:
            _warn(f"{each.path} is of another run: {timelines[0].path} is one of {size}. It is left out.")
    missing = sorted(set(range(size)) - {each.rank for each in timelines})
    if missing:
        _warn(
            f"Not found: rank {', '.join(map(str, missing))}. A rank on another host writes on that host's disk, "
            "unless the path is in a shared folder; and HOROVOD_TIMELINE must be set there too."
        )
    return [each for each in timelines if each.rank < size]


def _report(timelines: Sequence[RankTimeline], console: Console) -> None:
    """Prints where each rank's time went, and for whom the others wait."""
    found = {each.rank: slices(each.events, each.tensors, each.end) for each in timelines}
    waits = waiting(found)
    table = Table()
    for heading in ("rank", "host", "recorded", "waits for others", "on the wire", "others waited for it"):
        table.add_column(heading, justify="left" if heading == "host" else "right")
    for each in timelines:
        table.add_row(*_cells(each, found[each.rank], waits[each.rank]))
    console.print(table)
    for rank, mine in found.items():
        for cut in [each for each in mine if not each.ended and not each.native][:1]:
            print(
                f"Rank {rank}'s file ends during {cut.phase} of {cut.tensor!r}: killed there, or there still."
            )
    if len(timelines) > 1:
        print(verdict(waits, max(map(_recorded, found.values()))))
    if len({each.clock for each in timelines}) > 1:
        print(
            "The hosts are aligned by the time of day, which may differ between them by milliseconds; "
            "the table does not depend on it."
        )


def _cells(timeline: RankTimeline, mine: Sequence[Slice], wait: Waiting) -> tuple[str, ...]:
    recorded = _recorded(mine)
    return (
        str(timeline.rank),
        escape(timeline.host),
        _seconds(recorded),
        _share(time_in(mine, negotiates), recorded),
        _share(time_in(mine, sends), recorded) if any(map(sends, mine)) else "not seen",
        f"{_seconds(wait.micros)}, {wait.times} times",
    )


def _recorded(mine: Sequence[Slice]) -> float:
    return max((each.end for each in mine), default=0.0) - min((each.start for each in mine), default=0.0)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _seconds(micros: float) -> str:
    return f"{micros / 1e6:.2f} s"


def _warn(sentence: str) -> None:
    print(f"hvdtrain: {sentence}", file=sys.stderr)


def _refused(sentence: str) -> int:
    _warn(sentence)
    return 2
