"""A report as a picture; the only place that needs matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hvdtrain.bench import machine, sizes
from hvdtrain.bench.report import Report
from hvdtrain.bench.step import plot as step_plot

# One colour and mark each, that can be told apart in grey too.
_COLOURS = [colormaps["tab20"](number) for number in (*range(0, 20, 2), *range(1, 20, 2))]
_MARKS = "osD^vP*X<>hpd8H"


def draw(report: Report, path: Path) -> None:
    """Draws a report into a PNG file.

    Args:
        report: What was measured.
        path: The file to write.
    """
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    {"allreduce": _allreduce, "step": step_plot.draw}[report.bench](figure, report)
    title = f"hvdtrain bench {report.bench}, {report.ranks} ranks, {report.date[:10]}"
    figure.suptitle(f"{title}\n{machine.summary(report.machine)}", fontsize=9)
    figure.savefig(path, dpi=120)


def _allreduce(figure: Any, report: Report) -> None:
    """Draws time and bus bandwidth over size, with a band between the quartiles."""
    left, right = figure.subplots(1, 2)
    _lines(left, report, "latency_us", "time of one allreduce, µs", left.loglog)
    _lines(right, report, "bus_gb_s", "bus bandwidth, GB/s", right.loglog)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def _lines(axes: Any, report: Report, value: str, label: str, line: Callable[..., Any]) -> None:
    names = dict.fromkeys(row.contender for row in report.rows)
    for number, name in enumerate(names):
        mine = sorted((row for row in report.rows if row.contender == name), key=lambda row: row.key["bytes"])
        across = [row.key["bytes"] for row in mine]
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKS[number % len(_MARKS)]}
        style |= {"markersize": 4, "linewidth": 1.2}
        (drawn,) = line(across, [row.values[value].median for row in mine], label=name, **style)
        low, high = ([getattr(row.values[value], end) for row in mine] for end in ("low", "high"))
        axes.fill_between(across, low, high, alpha=0.2, color=drawn.get_color())
    ticks = sorted({row.key["bytes"] for row in report.rows})
    axes.set_xticks(ticks, [sizes.shown(each) for each in ticks], rotation=45, fontsize=8)
    axes.minorticks_off()
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
