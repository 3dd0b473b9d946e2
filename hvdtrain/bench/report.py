"""Store the results of a benchmark and the machine they belong to, write them as JSON and read them back."""

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from hvdtrain import __version__, cores
from hvdtrain.collectives.mpi.library import mpi_name
from hvdtrain.launch.hosts import run_captured
from hvdtrain.launch.launchers import mpirun

# The packages that may contain each module.
_PACKAGES = {
    "tensorflow": ("tensorflow", "tensorflow-cpu", "intel-tensorflow"),
    **{name: (name,) for name in ("keras", "tf_keras", "horovod", "torch", "mpi4py", "numpy")},
}


class ReportError(Exception):
    """A file is not a report, or cannot be written; the message says what to change."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one quantity, and its value in each round."""

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
    """Results of one contender for one kind of work."""

    key: Mapping[str, Any]  # the kind of work, such as the number of bytes
    contender: str
    values: Mapping[str, Spread]  # the quantities, with their unit in their name
    right: bool = True  # all results were right, on every rank


@dataclass(frozen=True)
class Report:
    """Results of one run of a benchmark, and the conditions of that run."""

    bench: str  # allreduce, step or tune
    ranks: int  # of a contender
    machine: Mapping[str, Any]  # the result of `describe_machine`
    options: Mapping[str, Any]
    rows: Sequence[Row]
    left_out: Mapping[str, str] = field(default_factory=dict)  # contenders that did not take part, and why
    command: str = field(default_factory=lambda: shlex.join(["hvdtrain", *sys.argv[1:]]))
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    hvdtrain: str = __version__  # that measured

    @property
    def wrong(self) -> list[Row]:
        """The rows whose results were not right."""
        return [row for row in self.rows if not row.right]

    @property
    def machine_line(self) -> str:
        """The hardware and the software."""
        machine = self.machine
        hardware = f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']:g} GiB"
        software = [str(machine["mpi"])] if "mpi" in machine else []
        for name in ("tensorflow", "keras", "horovod", "torch"):
            if name in machine:
                software.append(f"{name} {machine[name]}")
        return f"{hardware}; {', '.join([*software, 'Python ' + machine['python']])}"

    @property
    def ranks_line(self) -> str:
        """The ranks, their hosts, and whether each rank had its own cores."""
        hosts = self.machine["hosts"]
        line = f"{self.ranks} ranks on {len(hosts)} host{'s' * (len(hosts) > 1)} ({', '.join(hosts[:8])})"
        if self.machine["pinned"]:
            return f"{line}, each rank bound to a core of its own"
        return f"{line}; NOT pinned: there are fewer cores than ranks, so ranks disturb one another"

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"


def load(path: str) -> Report:
    """Read a report that `--save` has written; raise ReportError if it cannot be read or is none."""
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


def describe_machine(hosts: Sequence[str], pinned: bool) -> dict[str, Any]:
    """Return the host that measures, the software, the hosts of the ranks and whether each had its own cores."""
    return {
        "host": platform.node(),
        "cpu": cores.model(),
        "cores": len(cores.physical()),
        "quota": cores.quota(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "mpi": _mpi(),
        **{name: version for name, packages in _PACKAGES.items() if (version := _version(packages))},
        "hosts": hosts,
        "pinned": pinned,
    }


def _mpi() -> str:
    launcher = mpirun.find()
    if launcher is None:
        return "no MPI launcher"
    environ = {**os.environ, **launcher.settings(os.environ)}
    return mpi_name(run_captured([launcher.program, "--version"], environ, 60).stdout)


def _version(packages: tuple[str, ...]) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None
