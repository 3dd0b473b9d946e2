"""Read the hosts and slots of a job from the scheduler that started it: PBS, LSF, Grid Engine, OAR, Flux.

Slurm is not in the table: it starts the ranks itself (see slurm.py).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hvdtrain.cores import read_numbers
from hvdtrain.launch.hosts import Host, LaunchError, all_local, check_hosts, run_captured

Slots = Iterator[tuple[str, int]]


@dataclass(frozen=True)
class Job:
    """The scheduler's job in which this process runs."""

    scheduler: str  # name of the scheduler
    source: str  # the variable that names the hosts, and its value, for messages
    hosts: tuple[Host, ...]  # the hosts of the job with their slots

    @property
    def slots(self) -> int:
        """The number of slots of the job."""
        return sum(host.slots for host in self.hosts)

    def hosts_for(self, ranks: int) -> tuple[Host, ...]:
        """Check the hosts, and return those on which to start ranks; empty if this host is the only one."""
        if len(self.hosts) == 1 and all_local(self.hosts):
            return ()  # any number of ranks may start here: a job may have one slot with many cores
        check_hosts(self.hosts, self.source, ranks)
        return self.hosts


def find_job(environ: Mapping[str, str]) -> Job | None:
    """Return the job that the environment describes, or None if no variable of the table is set."""
    for scheduler in SCHEDULERS:
        value = environ.get(scheduler.variable)
        if value:
            source = f"{scheduler.variable}={value}, of this {scheduler.name} job,"
            return Job(scheduler.name, source, _hosts(scheduler, source, environ))
    return None


class _Scheduler(NamedTuple):
    """A scheduler and the way in which it lists the hosts of a job.

    `text` returns the hosts as text, given the value of the variable that only its jobs have, and the environment;
    `slots` yields hosts and slots from that text, in which a host may occur several times.
    """

    name: str
    variable: str
    text: Callable[[str, Mapping[str, str]], str]
    slots: Callable[[str], Slots]


def _read_file(value: str, environ: Mapping[str, str]) -> str:
    return Path(value).read_text()


def _variable_value(value: str, environ: Mapping[str, str]) -> str:
    return value


def _flux_resources(value: str, environ: Mapping[str, str]) -> str:
    done = run_captured(["flux", "resource", "R"], environ, 60)
    if done.returncode:
        raise LaunchError(f"`flux resource R` failed: {done.stderr.strip()[:300]}")
    return done.stdout


def _one_slot_per_line(text: str) -> Slots:
    for name in text.split():
        yield name, 1


def _alternating_host_and_slots(text: str) -> Slots:
    words = text.split()
    for name, number in zip(words[::2], words[1::2], strict=True):
        yield name, int(number)


def _columns(text: str) -> Slots:
    """Yield hosts and slots from lines of host, slots, queue and processors; a host has one line per queue."""
    for line in filter(str.strip, text.splitlines()):
        name, number = line.split()[:2]
        yield name, int(number)


def _resource_set(text: str) -> Slots:
    """Yield hosts and cores from Flux's RFC 20: groups of ranks with their cores, and the hosts in rank order."""
    execution = json.loads(text)["execution"]
    cores = {
        rank: len(read_numbers(group["children"]["core"]))
        for group in execution["R_lite"]
        for rank in read_numbers(group["rank"])
    }
    names = [name for part in execution["nodelist"] for name in _expand(part)]
    for rank, name in zip(sorted(cores), names, strict=True):
        yield name, cores[rank]


def _expand(text: str) -> Iterator[str]:
    """Yield the hosts of "a[01-03,7],b"."""
    for start, numbers in re.findall(r"([^,\[]+)(?:\[([^\]]+)\])?", text):
        if not numbers:
            yield start
            continue
        for part in numbers.split(","):
            width = len(part.partition("-")[0])
            yield from (f"{start}{number:0{width}}" for number in read_numbers(part))


# The first row whose variable is set wins.
SCHEDULERS = (
    _Scheduler("PBS", "PBS_NODEFILE", _read_file, _one_slot_per_line),
    _Scheduler("LSF", "LSB_DJOB_HOSTFILE", _read_file, _one_slot_per_line),
    _Scheduler("LSF", "LSB_MCPU_HOSTS", _variable_value, _alternating_host_and_slots),
    _Scheduler("Grid Engine", "PE_HOSTFILE", _read_file, _columns),
    _Scheduler("OAR", "OAR_NODEFILE", _read_file, _one_slot_per_line),
    _Scheduler("Flux", "FLUX_URI", _flux_resources, _resource_set),
)


def _hosts(scheduler: _Scheduler, source: str, environ: Mapping[str, str]) -> tuple[Host, ...]:
    advice = f"Name the hosts with -H a:4,b:4, or unset {scheduler.variable}."
    total: dict[str, int] = {}
    try:
        for name, slots in scheduler.slots(scheduler.text(environ[scheduler.variable], environ)):
            total[name] = total.get(name, 0) + slots
    except (OSError, UnicodeDecodeError, LaunchError) as error:
        raise LaunchError(f"{source} cannot be read: {error} {advice}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LaunchError(f"{source} does not hold hosts and slots as expected. {advice}") from error
    if not total:
        raise LaunchError(f"{source} names no host. {advice}")
    return tuple(Host(name, slots) for name, slots in total.items())
