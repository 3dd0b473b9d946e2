"""Read the hosts and slots of a job from the scheduler that started it: PBS, LSF, Grid Engine, OAR, Flux.

Slurm is not among them: it starts the ranks itself (see slurm.py).
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.launch.hosts import Host, LaunchError, all_local, check_hosts
from hvdtrain.launch.run_program import ask

Slots = Iterator[tuple[str, int]]


@dataclass(frozen=True)
class Job:
    """A job around this process.

    Args:
        scheduler: Whose job it is.
        source: The variable that names its hosts, and its value.
        hosts: Its hosts, each with its slots.
    """

    scheduler: str
    source: str
    hosts: tuple[Host, ...]

    @property
    def slots(self) -> int:
        """How many ranks the job has room for."""
        return sum(host.slots for host in self.hosts)

    def hosts_for(self, ranks: int) -> tuple[Host, ...]:
        """Return the hosts on which to start ranks; none where this host is the only one.

        Raises:
            LaunchError: If a host cannot be found, or several hosts have too few slots.
        """
        if len(self.hosts) == 1 and all_local(self.hosts):
            return ()  # as many ranks as are asked for: a job may ask for one slot of many cores
        check_hosts(self.hosts, self.source, ranks)
        return self.hosts


def find_job(environ: Mapping[str, str] = os.environ) -> Job | None:
    """Return the job that the environment tells of, or None where no scheduler of the table left a trace.

    Raises:
        LaunchError: If its hosts cannot be read.
    """
    for scheduler in SCHEDULERS:
        value = environ.get(scheduler.variable)
        if value:
            source = f"{scheduler.variable}={value}, of this {scheduler.name} job,"
            return Job(scheduler.name, source, _hosts(scheduler, source, environ))
    return None


@dataclass(frozen=True)
class _Scheduler:
    """How a scheduler tells a job's hosts.

    Args:
        name: What people call it.
        variable: The environment variable that only its jobs have.
        text: Returns the text that holds the hosts, given the variable's value and the environment.
        slots: Reads hosts and slots from that text; a host may come several times.
    """

    name: str
    variable: str
    text: Callable[[str, Mapping[str, str]], str]
    slots: Callable[[str], Slots]


def _file(value: str, environ: Mapping[str, str]) -> str:
    return Path(value).read_text()


def _value(value: str, environ: Mapping[str, str]) -> str:
    return value


def _flux_resources(value: str, environ: Mapping[str, str]) -> str:
    done = ask(["flux", "resource", "R"], environ, 60)
    if done.returncode:
        raise LaunchError(f"`flux resource R` failed: {done.stderr.strip()[:300]}")
    return done.stdout


def _a_line_a_slot(text: str) -> Slots:
    for name in text.split():
        yield name, 1


def _host_and_slots_in_turn(text: str) -> Slots:
    words = text.split()
    for name, number in zip(words[::2], words[1::2], strict=True):
        yield name, int(number)


def _columns(text: str) -> Slots:
    """Read lines of host, slots, queue and processors; a host has one line for each of its queues."""
    for line in filter(str.strip, text.splitlines()):
        name, number = line.split()[:2]
        yield name, int(number)


def _resource_set(text: str) -> Slots:
    """Read Flux's RFC 20: sets of ranks with the cores of each, and the hosts in the order of their ranks."""
    execution = json.loads(text)["execution"]
    cores = {
        rank: len(list(_numbers(group["children"]["core"])))
        for group in execution["R_lite"]
        for rank in _numbers(group["rank"])
    }
    names = [name for part in execution["nodelist"] for name in _expand(part)]
    for rank, name in zip(sorted(cores), names, strict=True):
        yield name, cores[rank]


def _numbers(text: str) -> Iterator[int]:
    """List the numbers of a set such as "0-2,7"."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _expand(text: str) -> Iterator[str]:
    """List the hosts of "a[01-03,7],b"."""
    for start, numbers in re.findall(r"([^,\[]+)(?:\[([^\]]+)\])?", text):
        if not numbers:
            yield start
            continue
        for part in numbers.split(","):
            width = len(part.partition("-")[0])
            yield from (f"{start}{number:0{width}}" for number in _numbers(part))


# The first row whose variable is set wins.
SCHEDULERS = (
    _Scheduler("PBS", "PBS_NODEFILE", _file, _a_line_a_slot),
    _Scheduler("LSF", "LSB_DJOB_HOSTFILE", _file, _a_line_a_slot),
    _Scheduler("LSF", "LSB_MCPU_HOSTS", _value, _host_and_slots_in_turn),
    _Scheduler("Grid Engine", "PE_HOSTFILE", _file, _columns),
    _Scheduler("OAR", "OAR_NODEFILE", _file, _a_line_a_slot),
    _Scheduler("Flux", "FLUX_URI", _flux_resources, _resource_set),
)


def _hosts(scheduler: _Scheduler, source: str, environ: Mapping[str, str]) -> tuple[Host, ...]:
    instead = f"Name the hosts with -H a:4,b:4, or unset {scheduler.variable}."
    total: dict[str, int] = {}
    try:
        for name, slots in scheduler.slots(scheduler.text(environ[scheduler.variable], environ)):
            total[name] = total.get(name, 0) + slots
    except (OSError, UnicodeDecodeError, LaunchError) as error:
        raise LaunchError(f"{source} cannot be read: {error} {instead}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LaunchError(f"{source} does not hold hosts and slots as expected. {instead}") from error
    if not total:
        raise LaunchError(f"{source} names no host. {instead}")
    return tuple(Host(name, slots) for name, slots in total.items())
