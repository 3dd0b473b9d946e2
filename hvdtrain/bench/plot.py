"""Draw a report into a PNG file; the only module that needs matplotlib."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hvdtrain.bench import sizes
from hvdtrain.bench.report import Report, Row
from hvdtrain.bench.step_contenders import STRONG, WEAK

# One colour and marker for each contender; they differ in greyscale too.
_COLOURS = [colormaps["tab20"](number) for number in (*range(0, 20, 2), *range(1, 20, 2))]
_MARKERS = "osD^vP*X<>hpd8H"

_COMPUTING_COLOUR, _ADDED_COLOUR = "#9aa7b4", "#c8553d"  # they differ in greyscale too
_SCALING_TITLES = {WEAK: "for each rank", STRONG: "for all ranks"}


def draw(report: Report, path: Path) -> None:
    """Draw a report of bench allreduce or bench step into a PNG file."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    {"allreduce": _draw_allreduce, "step": _draw_step}[report.bench](figure, report)
    title = f"hvdtrain bench {report.bench}, {report.ranks} ranks, {report.date[:10]}"
    figure.suptitle(f"{title}\n{report.machine_line}", fontsize=9)
    figure.savefig(path, dpi=120)


def _draw_allreduce(figure: Any, report: Report) -> None:
    """Draw time and bus bandwidth over size, with a band between the quartiles."""
    left, right = figure.subplots(1, 2)
    _lines(left, report, "latency_us", "time of one allreduce, µs", left.loglog)
    _lines(right, report, "bus_gb_s", "bus bandwidth, GB/s", right.loglog)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def _lines(axes: Any, report: Report, quantity: str, label: str, plot: Callable[..., Any]) -> None:
    names = dict.fromkeys(row.contender for row in report.rows)
    for number, name in enumerate(names):
        rows = sorted((row for row in report.rows if row.contender == name), key=lambda row: row.key["bytes"])
        spreads = [row.values[quantity] for row in rows]
        x = [row.key["bytes"] for row in rows]
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        style |= {"markersize": 4, "linewidth": 1.2}
        (line,) = plot(x, [spread.median for spread in spreads], label=name, **style)
        low, high = [spread.low for spread in spreads], [spread.high for spread in spreads]
        axes.fill_between(x, low, high, alpha=0.2, color=line.get_color())
    ticks = sorted({row.key["bytes"] for row in report.rows})
    axes.set_xticks(ticks, [sizes.format_size(size) for size in ticks], rotation=45, fontsize=8)
    axes.minorticks_off()
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _draw_step(figure: Any, report: Report) -> None:
    """Draw the step times of all contenders as bars, weak scaling beside strong scaling."""
    measured = {row.key["scaling"] for row in report.rows}
    scalings = [scaling for scaling in _SCALING_TITLES if scaling in measured]
    subplots = figure.subplots(1, len(scalings), squeeze=False)[0]
    for axes, scaling in zip(subplots, scalings, strict=True):
        rows = [row for row in report.rows if row.key["scaling"] == scaling]
        _bars(axes, rows)
        key = rows[0].key
        axes.set_title(f"{key['model']}, a batch of {key['batch']} {_SCALING_TITLES[scaling]}", fontsize=9)
    figure.legend(*subplots[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    """Divide each bar by the efficiency, and write the efficiency beside it."""
    names, steps = [row.contender for row in rows], [row.values["step_ms"] for row in rows]
    shares = [row.values["efficiency"].median if "efficiency" in row.values else 1.0 for row in rows]
    whole = [step.median for step in steps]
    computing = [time * min(share, 1.0) for time, share in zip(whole, shares, strict=True)]
    errors = [[step.median - step.low for step in steps], [step.high - step.median for step in steps]]
    axes.barh(names, whole, xerr=errors, color=_ADDED_COLOUR, height=0.6, label="added by working together")
    label = "as long as a process by itself computes"
    axes.barh(names, computing, color=_COMPUTING_COLOUR, height=0.6, label=label)
    for y, share in enumerate(shares):
        axes.annotate(f"{share:.2f}", (0, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlabel("ms a step; in the bars: efficiency", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
