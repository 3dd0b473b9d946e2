"""Store the results of a benchmark, write them as JSON and read them back."""

import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hvdtrain import __version__


class ReportError(Exception):
    """A file is not a report, or cannot be written; the message says what to change."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one quantity over all rounds.

    Args:
        median: The median.
        low: The lower quartile.
        high: The upper quartile.
        rounds: The value of each round.
    """

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, rounds: Sequence[float]) -> "Spread":
        """Return the spread of the values of one or more rounds."""
        if len(rounds) == 1:
            return cls(rounds[0], rounds[0], rounds[0], tuple(rounds))
        low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return cls(median, low, high, tuple(rounds))


@dataclass(frozen=True)
class Row:
    """Results of one contender for one kind of work.

    Args:
        key: The kind of work, such as the number of bytes.
        contender: The contender's name.
        values: The quantities, with their unit in their name.
        right: Whether all results were right, on every rank.
    """

    key: Mapping[str, Any]
    contender: str
    values: Mapping[str, Spread]
    right: bool = True


@dataclass(frozen=True)
class Report:
    """Results of one run of a benchmark, and the conditions of that run.

    Args:
        bench: Name of the benchmark: allreduce or step.
        ranks: Number of ranks of a contender.
        machine: The result of `machine.describe`.
        options: The options of the command.
        rows: The measurements.
        left_out: The contenders that did not take part, and why.
        command: The command line.
        date: Date and time, with the time zone.
        hvdtrain: The version of hvdtrain that measured.
    """

    bench: str
    ranks: int
    machine: Mapping[str, Any]
    options: Mapping[str, Any]
    rows: Sequence[Row]
    left_out: Mapping[str, str] = field(default_factory=dict)
    command: str = field(default_factory=lambda: shlex.join(["hvdtrain", *sys.argv[1:]]))
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    hvdtrain: str = __version__

    @property
    def wrong(self) -> list[Row]:
        """The rows whose results were not right."""
        return [row for row in self.rows if not row.right]

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"


def load(path: str) -> Report:
    """Read a report that `--save` has written.

    Raises:
        ReportError: If the file cannot be read or is not a report.
    """
    try:
        fields = json.loads(Path(path).read_text())
        rows = [_row(row) for row in fields.pop("rows")]
        fields |= {name: dict(fields[name]) for name in ("machine", "options", "left_out")}
        return Report(rows=rows, **fields)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(
            f"{path} is not a report of hvdtrain bench ({type(error).__name__}: {error}); expected a file that "
            "--save has written."
        ) from error


def _row(fields: Mapping[str, Any]) -> Row:
    values = {name: _spread(value) for name, value in fields["values"].items()}
    return Row(dict(fields["key"]), fields["contender"], values, fields["right"])


def _spread(fields: Mapping[str, Any]) -> Spread:
    median, low, high = (float(fields[name]) for name in ("median", "low", "high"))
    return Spread(median, low, high, tuple(map(float, fields["rounds"])))
