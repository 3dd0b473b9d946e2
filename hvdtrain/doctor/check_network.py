"""Check the network interface for gradients between hosts, the name of this host, and ssh."""

import fcntl
import shutil
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain import safe_path
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.probe_runner import ProbeRunner

SIOCGIFADDR = 0x8915
INTERFACES = Path("/sys/class/net")

# Bridges and tunnels of containers and virtual machines. They often have the same address on every host, so a
# rank that connects to another host through them reaches itself.
PRIVATE = (
    *("docker", "br-", "virbr", "veth", "cni", "flannel", "cali", "lxc", "lxd", "podman"),
    *("vmnet", "vboxnet"),
)

# The variables with which a user selects the interface, by the launcher's MPI ("" without one), else of Hydra.
_OPEN_MPI = ("OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_oob_tcp_if_include")
HYDRA = ("HYDRA_IFACE", "FI_TCP_IFACE")
CHOOSING = {
    "": _OPEN_MPI,
    "Open MPI 4": _OPEN_MPI,
    "Open MPI 5": ("OMPI_MCA_btl_tcp_if_include", "PRTE_MCA_prte_if_include"),
}


@dataclass(frozen=True)
class Interface:
    """A network interface with its IPv4 address and its speed in Mbit/s, None if the kernel does not know it."""

    name: str
    address: str
    speed: int | None

    @property
    def private(self) -> bool:
        """Whether it belongs to containers or virtual machines of this host."""
        return self.name.startswith(PRIVATE)

    def __str__(self) -> str:
        rate = "" if self.speed is None else f", {self.speed / 1000:g} Gbit/s"
        return f"{self.name} ({self.address}{rate})"


def network(probes: ProbeRunner) -> Finding:
    """Return which interfaces MPI would use between hosts."""
    mpi = probes.launcher.mpi.name if probes.launcher else ""
    return judge_network(interfaces(), CHOOSING.get(mpi, HYDRA), probes.environ)


def interfaces() -> list[Interface]:
    """Return the interfaces that have an address and lead to other hosts."""
    found = [Interface(path.name, _address(path.name), _speed(path)) for path in sorted(INTERFACES.iterdir())]
    return [one for one in found if one.address and not one.address.startswith("127.")]


def _address(interface: str) -> str:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])
        except OSError:
            return ""


def _speed(path: Path) -> int | None:
    try:
        speed = int((path / "speed").read_text())
    except (OSError, ValueError):
        return None
    return speed if speed > 0 else None


def judge_network(found: Sequence[Interface], choosing: Sequence[str], environ: Mapping[str, str]) -> Finding:
    """Judge which interfaces MPI would use between hosts; `choosing` are the variables that select one."""
    name, listed = "Network", ", ".join(map(str, found))
    chosen = next((environ[variable] for variable in choosing if environ.get(variable)), "")
    if chosen:
        # A network such as 10.1.0.0/16 may be given in place of an interface; MPI matches it.
        known = {"lo", *(interface.name for interface in found)}
        unknown = [part for part in chosen.split(",") if part not in known and "/" not in part]
        if not unknown:
            return ok(name, f"{listed}; between hosts {chosen} is used, as you chose")
        problem = f"Ranks are told to use {', '.join(unknown)}, which has no address here"
        return wrong(name, f"{problem}; there is: {listed or 'none'}.", f"unset {' '.join(choosing)}")
    if not found:
        return note(name, "No interface leads to other hosts; ranks on this host communicate through memory.")
    if len(found) == 1:
        return ok(name, f"{listed}; it would be used between hosts")
    best = max(found, key=lambda interface: (not interface.private, interface.speed or 0))
    settings = "export " + " ".join(f"{variable}={best.name}" for variable in choosing)
    if any(interface.private for interface in found):
        return note(name, f"{listed}. Between hosts MPI may try those of containers and hang.", settings)
    return note(name, f"{listed}. Between hosts MPI would use any of them; to select one:", settings)


def hostname(probes: ProbeRunner) -> Finding:
    """Check that the name of this host resolves to an address that other hosts can reach."""
    host = socket.gethostname()
    # In another process, because a name server that does not answer can block the call for a minute.
    resolve = "import socket; print(socket.gethostbyname(sys.argv[1]))"
    result = probes.run(sys.executable, *safe_path.code(resolve), host)
    outward = sorted(interfaces(), key=lambda interface: interface.private)
    reachable = outward[0].address if outward else ""
    return judge_hostname(host, result.out.strip() if result.code == 0 else "", reachable)


def judge_hostname(host: str, address: str, reachable: str) -> Finding:
    """Judge the address to which a host name resolves, and that under which other hosts reach the host, if any."""
    fix = f"sed -i '1i {reachable or '127.0.0.1'} {host}' /etc/hosts   # as root"
    if not address:
        found = f"{host} resolves to no address: MPI may wait for a name server or fail."
        return note("Host name", found, fix)
    if address.startswith("127.") and reachable:
        found = f"{host} is {address}: enough on one host, but other hosts cannot use it."
        return note("Host name", found, fix)
    return ok("Host name", f"{host} is {address}")


def ssh(environ: Mapping[str, str]) -> Finding:
    """Check for ssh, with which launchers start ranks on other hosts outside of Slurm."""
    program = shutil.which("ssh", path=environ.get("PATH"))
    if program:
        return ok("ssh", f"{program}, to start ranks on other hosts")
    found = "Not found: no ranks on other hosts, except with Slurm."
    return note("ssh", found, "apt-get install openssh-client")
