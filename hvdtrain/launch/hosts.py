"""Read and check the hosts and slots of `-H` or a hostfile, and run programs on this host before a job starts."""

import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# One host per line, in the format of Open MPI (`a slots=4`) or of Hydra (`a:4`).
_LINE = re.compile(
    r"(?P<name>[^\s:=]+)(?::(?P<colon>\d+)|\s+slots\s*=\s*(?P<slots>\d+)(\s+max[-_]slots\s*=\s*\d+)?)?"
)


class LaunchError(Exception):
    """Raised if the command line or the installation cannot start a job; the message says what to change."""


@dataclass(frozen=True)
class Host:
    """A host and the number of ranks it can take."""

    name: str
    slots: int


def read_hosts(named: str | None, hostfile: str | None, ranks: int | None = None) -> tuple[Host, ...]:
    """Read the requested hosts, and check that they exist and have enough slots; return none if none are named.

    Args:
        named: The value of `-H`, such as "a:4,b:4".
        hostfile: A file with one host per line.
        ranks: The number of ranks to start; if None, as many as there are slots.

    Raises:
        LaunchError: If both are given, or the hosts cannot be read, cannot be resolved or have too few slots.
    """
    if named and hostfile:
        raise LaunchError("Give the hosts with -H or with --hostfile, not with both.")
    if named:
        entries, source = [entry.strip() for entry in named.split(",")], "-H"
    elif hostfile:
        entries, source = _lines(hostfile), f"The hostfile {hostfile}"
    else:
        return ()
    hosts = tuple(_parse(entry, source) for entry in entries)
    check_hosts(hosts, source, 1 if ranks is None else ranks)
    return hosts


def check_hosts(hosts: Sequence[Host], source: str, ranks: int) -> None:
    """Raise a LaunchError if hosts, named in `source`, have too few slots or cannot be resolved."""
    slots = sum(host.slots for host in hosts)
    if slots < ranks:
        per_host = -(-ranks // len(hosts)) if hosts else ranks
        enough = ",".join(f"{host.name}:{per_host}" for host in hosts or [Host("localhost", 1)])
        raise LaunchError(
            f"{source} names {slots} slot(s) on {len(hosts)} host(s), fewer than the {ranks} ranks of -np; a "
            f"host without a number has one slot, so write -H {enough} for example."
        )
    for host in hosts:
        _resolve(host.name, source)


def all_local(hosts: Sequence[Host]) -> bool:
    """Return whether every host is this machine; true if there are no hosts."""
    return all(_is_local(host.name) for host in hosts)


def addresses_towards(hosts: Sequence[str]) -> list[str]:
    """Return addresses under which the hosts are likely to reach this machine, the most likely first."""
    found = dict.fromkeys(address for host in hosts if (address := _source_address(host)))
    found[socket.gethostname()] = None
    return list(found)


def run_captured(
    command: Sequence[str], environ: Mapping[str, str], seconds: float | None
) -> subprocess.CompletedProcess[str]:
    """Run a program, such as `mpirun --version` or a step of srun, and return its output and exit code.

    Raises:
        LaunchError: If it cannot be started, or does not end within `seconds`; None is no limit.
    """
    try:
        return subprocess.run(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except OSError as error:
        raise LaunchError(f"{command[0]} was found but does not run: {error}.") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{command[0]} was found but has not ended within {seconds:g} s.") from error


def _lines(hostfile: str) -> list[str]:
    """Return the lines of a file without comments and empty lines."""
    try:
        lines = Path(hostfile).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"The hostfile {hostfile} cannot be read: {error}.") from error
    entries = [line.partition("#")[0].strip() for line in lines]
    return [entry for entry in entries if entry]


def _parse(entry: str, source: str) -> Host:
    match = _LINE.fullmatch(entry)
    slots = int(match["colon"] or match["slots"] or 1) if match else 0
    if not match or slots < 1:
        raise LaunchError(
            f"{source} has {entry!r} where a host and a number of slots was expected, as in a:4 "
            "(in a file also: a slots=4)."
        )
    return Host(match["name"], slots)


def _resolve(name: str, source: str) -> list[tuple]:
    try:
        return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"{source} names the host {name}, which this machine cannot find ({error}): check the spelling, "
            f"or try `getent hosts {name}`."
        ) from error


def _is_local(name: str) -> bool:
    """Return whether a host is this machine, by binding a socket to its address, which fails for other machines."""
    family, kind, protocol, _, address = _resolve(name, "The launch")[0]
    try:
        with socket.socket(family, kind, protocol) as sock:
            sock.bind((address[0], 0, *address[2:]))
    except OSError:
        return False
    return True


def _source_address(host: str) -> str | None:
    """Return the address of this machine on the route to a host. Connecting a UDP socket sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((host, 9))
            return str(sock.getsockname()[0])
    except OSError:
        return None
