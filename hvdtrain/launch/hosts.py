"""Which hosts, and how many ranks on each: read from `-H` or a file, and checked before anything starts."""

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# One host a line, as Open MPI writes it (`a slots=4`) or as Hydra does (`a:4`).
_LINE = re.compile(
    r"(?P<name>[^\s:=]+)(?::(?P<colon>\d+)|\s+slots\s*=\s*(?P<slots>\d+)(\s+max[-_]slots\s*=\s*\d+)?)?"
)


class LaunchError(Exception):
    """What was typed, or what is installed here, cannot start a job; the message says what to change."""


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it takes."""

    name: str
    slots: int


def read_hosts(named: str | None, hostfile: str | None, ranks: int | None = None) -> tuple[Host, ...]:
    """Read the hosts that were asked for, and makes sure that they exist and suffice.

    Args:
        named: The value of `-H`, as in "a:4,b:4".
        hostfile: A file with one host a line.
        ranks: How many ranks are to be started; as many as there are slots if None.

    Returns:
        The hosts in the order given; none at all where neither was given.

    Raises:
        LaunchError: Where they contradict each other, cannot be read, do not resolve or do not suffice.
    """
    if named and hostfile:
        raise LaunchError("Give the hosts with -H or with --hostfile, not with both.")
    entries, source = _entries(named, hostfile)
    if not source:
        return ()
    hosts = tuple(_parse(entry, source) for entry in entries)
    check_hosts(hosts, source, 1 if ranks is None else ranks)
    return hosts


def check_hosts(hosts: Sequence[Host], source: str, ranks: int) -> None:
    """Raise a LaunchError where hosts have too few slots for ranks, or cannot be found.

    Args:
        hosts: The hosts.
        source: What named them, for the message.
        ranks: How many ranks are to be started.
    """
    slots = sum(host.slots for host in hosts)
    if slots < ranks:
        raise LaunchError(
            f"{source} names {slots} slot(s) on {len(hosts)} host(s), fewer than the {ranks} ranks of -np; a "
            f"host without a number counts as one slot, so write {_suggestion(hosts, ranks)} for example."
        )
    for host in hosts:
        _resolve(host.name, source)


def all_local(hosts: Sequence[Host]) -> bool:
    """Return whether every host is this one; so it is when none was named."""
    return all(_is_local(host.name) for host in hosts)


def addresses_towards(hosts: Sequence[str]) -> list[str]:
    """List the addresses under which those hosts are likely to reach this one, the likeliest first."""
    found = dict.fromkeys(address for host in hosts if (address := _source_address(host)))
    found[socket.gethostname()] = None
    return list(found)


def _entries(named: str | None, hostfile: str | None) -> tuple[list[str], str]:
    if named:
        return [entry.strip() for entry in named.split(",")], "-H"
    if not hostfile:
        return [], ""
    try:
        lines = Path(hostfile).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"The hostfile {hostfile} cannot be read: {error}.") from error
    entries = [line.partition("#")[0].strip() for line in lines]
    return [entry for entry in entries if entry], f"The hostfile {hostfile}"


def _parse(entry: str, source: str) -> Host:
    match = _LINE.fullmatch(entry)
    slots = int(match["colon"] or match["slots"] or 1) if match else 0
    if not match or slots < 1:
        raise LaunchError(
            f"{source} has {entry!r} where a host and a number of slots was expected, as in a:4 "
            "(in a file also: a slots=4)."
        )
    return Host(match["name"], slots)


def _suggestion(hosts: Sequence[Host], ranks: int) -> str:
    each = -(-ranks // len(hosts)) if hosts else ranks
    return "-H " + ",".join(f"{host.name}:{each}" for host in hosts or [Host("localhost", 1)])


def _resolve(name: str, source: str) -> list[tuple]:
    try:
        return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"{source} names the host {name}, which this machine cannot find ({error}): check the spelling, "
            f"or try `getent hosts {name}`."
        ) from error


def _is_local(name: str) -> bool:
    """Return whether a host is this machine: only here can a socket be bound to its address."""
    family, kind, protocol, _, address = _resolve(name, "The launch")[0]
    try:
        with socket.socket(family, kind, protocol) as sock:
            sock.bind((address[0], 0, *address[2:]))
    except OSError:
        return False
    return True


def _source_address(host: str) -> str | None:
    """Ask the routing table which address we have towards a host; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((host, 9))
            return str(sock.getsockname()[0])
    except OSError:
        return None
