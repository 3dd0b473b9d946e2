"""Print the reports of `hvdtrain bench allreduce` and `hvdtrain bench step` as tables."""

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvdtrain.bench import sizes
from hvdtrain.bench.models import WORKLOADS
from hvdtrain.bench.report import Report, Row
from hvdtrain.bench.step_contenders import COMPUTE_ONLY, STRONG, TF_KERAS, TORCH, WEAK, WRAPPED

# Contenders of bench allreduce.
OURS = "hvdtrain mpi"
RAW, BEST = "raw MPI", "best MPI"
VARIANT = "MPI, "  # prefix of the contenders that call MPI in another way than one plain call
COPY, ADD, LINK = "one core copies", "one core adds", "link between hosts"
LIMITS = (COPY, ADD, LINK)

Column = tuple[str, Callable[[Row], str]]  # heading, and the text of a row

_EXPLANATION = (
    "efficiency: the step of the same number of independent processes, running at the same time, over this step. "
    "beside slowest: the same with the slowest of these processes, on whose core all ranks would have to wait. "
    f"communication: the part of a step that `{COMPUTE_ONLY}` does not have. "
    "over alone: peak memory beyond that of the independent process, in units of all gradients."
)
_EXPLANATION_FIT = (
    f"beside wrapped: the epoch of `{WRAPPED}`, which starts without Keras' pause, over this epoch."
)


def new_table(title: str, headings: Sequence[str], left: Sequence[str], no_wrap: bool = False) -> Table:
    """Return an empty table.

    Args:
        title: The title.
        headings: The headings of the columns.
        left: The headings of those columns that are aligned to the left.
        no_wrap: Whether cells stay on one line.
    """
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(Text(heading), justify="left" if heading in left else "right", no_wrap=no_wrap)
    return table


def median(heading: str, quantity: str, text: Callable[[float], str]) -> Column:
    """Return a column with the median of a quantity, as `text` formats it; empty in rows without it."""
    return heading, lambda row: text(row.values[quantity].median) if quantity in row.values else ""


def quartiles(quantity: str, text: Callable[[float], str], dash: str = " - ") -> Column:
    """Return a column with the quartiles of a quantity, as `text` formats them; empty in rows without it."""

    def cell(row: Row) -> str:
        spread = row.values.get(quantity)
        return f"{text(spread.low)}{dash}{text(spread.high)}" if spread else ""

    return "quartiles", cell


def render_allreduce(report: Report, console: Console) -> None:
    """Print all contenders at each size, and ratios of bus bandwidths."""
    console.print(_time_table(report))
    names = dict.fromkeys(row.contender for row in report.rows if not row.contender.startswith(VARIANT))
    if OURS in names:
        console.print(_ratio_table(report, [name for name in names if name != OURS]))


def render_step(report: Report, console: Console) -> None:
    """Print weak scaling, strong scaling, and an explanation of the columns."""
    for scaling in (WEAK, STRONG):
        if any(row.key["scaling"] == scaling for row in report.rows):
            console.print(_step_table(report, scaling))
    console.print(_EXPLANATION, markup=False)
    if report.options.get("fit"):
        console.print(_EXPLANATION_FIT, markup=False)
    for name in dict.fromkeys(row.contender for row in report.wrong):
        console.print(
            f"WRONG: {name} ended with weights that differ between its ranks, or with numbers that are not finite.",
            markup=False,
        )


def _rows_by_size(report: Report) -> Iterator[tuple[str, list[Row]]]:
    for size in sorted({row.key["bytes"] for row in report.rows}):
        yield sizes.format_size(size), [row for row in report.rows if row.key["bytes"] == size]


def _best_mpi(rows: Sequence[Row]) -> Row | None:
    """Return the fastest way of calling MPI, among the rows of one size."""
    ways = [row for row in rows if row.contender == RAW or row.contender.startswith(VARIANT)]
    return min(ways, key=lambda row: row.values["latency_us"].median, default=None)


def _time_table(report: Report) -> Table:
    columns: list[Column] = [
        median("time, µs", "latency_us", _three_figures),
        quartiles("latency_us", _three_figures),
        median("algorithm, GB/s", "algorithm_gb_s", _three_figures),
        median("bus, GB/s", "bus_gb_s", _three_figures),
        quartiles("bus_gb_s", _three_figures),
        ("right", lambda row: "" if row.right and row.contender in LIMITS else _right(row)),
    ]
    title = f"allreduce of {report.options['dtype']}, {report.ranks} ranks: {_rounds(report)}"
    table = new_table(title, ["size", "", *(heading for heading, _ in columns)], ["", "right"])
    for size, rows in _rows_by_size(report):
        for number, (name, row) in enumerate(_named_rows(rows)):
            table.add_row("" if number else size, name, *(cell(row) for _, cell in columns))
        table.add_section()
    return table


def _named_rows(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Return the rows of one size with their names; "best MPI" follows raw MPI and replaces all variants."""
    named = [(row.contender, row) for row in rows if not row.contender.startswith(VARIANT)]
    best = _best_mpi(rows)
    if best is not None:
        way = "one call" if best.contender == RAW else best.contender.removeprefix(VARIANT)
        names = [name for name, _ in named]
        position = names.index(RAW) + 1 if RAW in names else len(names)
        named.insert(position, (f"{BEST} ({way})", best))
    return named


def _ratio_table(report: Report, others: list[str]) -> Table:
    """Return the bus bandwidth of our engine over that of each other contender, by size."""
    if RAW in others:
        others.insert(others.index(RAW) + 1, BEST)
    table = new_table(f"bus bandwidth of {OURS}, as a multiple of", ["size", *others], [])
    table.columns[0].no_wrap = True
    for size, rows in _rows_by_size(report):
        bandwidths = {row.contender: row.values["bus_gb_s"].median for row in rows}
        best = _best_mpi(rows)
        if best:
            bandwidths[BEST] = bandwidths[best.contender]
        cells = []
        for name in others:
            both = name in bandwidths and OURS in bandwidths
            cells.append(f"{bandwidths[OURS] / bandwidths[name]:.2f}" if both else "")
        table.add_row(size, *cells)
    return table


def _step_table(report: Report, scaling: str) -> Table:
    columns = _strong_columns(report) if scaling == STRONG else _weak_columns(report)
    rows = [row for row in report.rows if row.key["scaling"] == scaling]
    batch = f"{rows[0].key['batch']} {'for all ranks' if scaling == STRONG else 'a rank'}"
    fit = f"epochs of {report.options['fit']} steps by fit, " if report.options.get("fit") else ""
    title = f"{report.options['model']}, {fit}a batch of {batch}, {report.ranks} ranks: {_rounds(report)}"
    table = new_table(title, ["", *(heading for heading, _ in columns)], [""], no_wrap=True)
    for row in rows:
        if row.contender in (TORCH, TF_KERAS):
            table.add_section()
        table.add_row(row.contender, *(cell(row) for _, cell in columns))
    return table


def _weak_columns(report: Report) -> list[Column]:
    beside_wrapped = median("beside\nwrapped", "beside_wrapped", "{:.3f}".format)
    return [
        median("ms a step", "step_ms", _milliseconds),
        beside_wrapped if report.options.get("fit") else _throughput(report),
        median("effi-\nciency", "efficiency", "{:.3f}".format),
        quartiles("efficiency", "{:.3f}".format, "-"),
        median("beside\nslowest", "beside_slowest", "{:.3f}".format),
        median("commu-\nnication", "communication", "{:.1%}".format),
        median("peak\nMiB", "peak_mib", "{:.0f}".format),
        median("over\nalone", "excess_gradients", "{:+.2f}".format),
        ("right", _right),
    ]


def _strong_columns(report: Report) -> list[Column]:
    return [
        median("ms a step", "step_ms", _milliseconds),
        quartiles("step_ms", _milliseconds, "-"),
        _throughput(report),
        median("speed-\nup", "speedup", "{:.2f}".format),
        median("effi-\nciency", "efficiency", "{:.3f}".format),
        quartiles("efficiency", "{:.3f}".format, "-"),
        ("right", _right),
    ]


def _throughput(report: Report) -> Column:
    unit = WORKLOADS[report.options["model"]].unit
    return median(f"{unit}/s", f"{unit}_per_s", "{:.0f}".format)


def _rounds(report: Report) -> str:
    return f"medians of {report.options['rounds']} rounds, and quartiles"


def _right(row: Row) -> str:
    return "yes" if row.right else "WRONG"


def _three_figures(value: float) -> str:
    """Return a number with three significant figures, or all its figures before the decimal point."""
    digits = max(0, 3 - len(str(int(value)))) if value >= 1 else 3
    return f"{value:.{digits}f}"


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
