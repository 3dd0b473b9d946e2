"""What a benchmark found: a record that is printed, written as JSON, read back and compared."""

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
    """A file is no report, or cannot be written; the message says what to change."""


@dataclass(frozen=True)
class Spread:
    """One quantity over all rounds.

    Args:
        median: The middle one.
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
        """Sums up the values of some rounds, at least one."""
        low, median, high = (
            statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else [*rounds] * 3
        )
        return cls(median, low, high, tuple(rounds))


@dataclass(frozen=True)
class Row:
    """What one contender did on one piece of work.

    Args:
        key: Which work: bytes, say.
        contender: Whose.
        values: The quantities, with their unit in their name.
        right: Whether all results were right, on every rank.
    """

    key: Mapping[str, Any]
    contender: str
    values: Mapping[str, Spread]
    right: bool = True


@dataclass(frozen=True)
class Report:
    """What one run of a benchmark found, and where.

    Args:
        bench: Which benchmark: allreduce or step.
        ranks: How many ranks a contender had.
        machine: What `machine.describe` says.
        options: What was asked for.
        rows: The measurements.
        left_out: Who did not take part, and why.
        command: What was typed.
        date: When, with the time zone.
        hvdtrain: The version that measured.
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
        """Writes the report as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def median(self, key: Mapping[str, Any], contender: str, value: str) -> float | None:
        """Looks up one median; None where it was not measured."""
        for row in self.rows:
            if row.contender == contender and row.key == key and value in row.values:
                return row.values[value].median
        return None


def load(path: str) -> Report:
    """Reads a report that `--save` has written.

    Raises:
        ReportError: If the file cannot be read or is none.
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
            f"{path} is no report of hvdtrain bench ({type(error).__name__}: {error}); expected a file that "
            "--save has written."
        ) from error


def _row(fields: Mapping[str, Any]) -> Row:
    values = {name: _spread(value) for name, value in fields["values"].items()}
    return Row(dict(fields["key"]), fields["contender"], values, fields["right"])


def _spread(fields: Mapping[str, Any]) -> Spread:
    median, low, high = (float(fields[name]) for name in ("median", "low", "high"))
    return Spread(median, low, high, tuple(map(float, fields["rounds"])))
