"""`hvdtrain bench step` as a picture: of each step, what computing takes and what working together adds."""

from collections.abc import Sequence
from typing import Any

from hvdtrain.bench.report import Report, Row
from hvdtrain.bench.step.rows import STRONG, WEAK

COMPUTING, ADDED = "#9aa7b4", "#c8553d"  # can be told apart in grey too

_TITLES = {WEAK: "for each rank", STRONG: "for all ranks"}


def draw(figure: Any, report: Report) -> None:
    """Draws the steps of all contenders as bars, weak scaling beside strong.

    Args:
        figure: The figure of matplotlib to draw into.
        report: What was measured.
    """
    there = dict.fromkeys(row.key["scaling"] for row in report.rows)
    parts = figure.subplots(1, len(there), squeeze=False)[0]
    for axes, scaling in zip(parts, sorted(there, key=list(_TITLES).index), strict=True):
        rows = [row for row in report.rows if row.key["scaling"] == scaling]
        _bars(axes, rows)
        key = rows[0].key
        axes.set_title(f"{key['model']}, a batch of {key['batch']} {_TITLES[scaling]}", fontsize=9)
    figure.legend(*parts[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    """Divides each bar by the efficiency, which stands beside it."""
    names, steps = [row.contender for row in rows], [row.values["step_ms"] for row in rows]
    shares = [row.values["efficiency"].median if "efficiency" in row.values else 1.0 for row in rows]
    whole = [each.median for each in steps]
    computing = [each * min(share, 1.0) for each, share in zip(whole, shares, strict=True)]
    wings = [[each.median - each.low for each in steps], [each.high - each.median for each in steps]]
    axes.barh(names, whole, xerr=wings, color=ADDED, height=0.6, label="added by working together")
    axes.barh(names, computing, color=COMPUTING, height=0.6, label="as long as a process by itself computes")
    for place, share in enumerate(shares):
        axes.annotate(f"{share:.2f}", (0, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlabel("ms a step; in the bars: efficiency", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
