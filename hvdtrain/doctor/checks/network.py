"""Networks: over which interface gradients would travel to other hosts, and how this host is found."""

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
from hvdtrain.doctor.inquiry import Inquiry

SIOCGIFADDR = 0x8915
INTERFACES = Path("/sys/class/net")

# Bridges and tunnels of containers and virtual machines: often the same address on every host, so a rank
# that calls another through them reaches itself.
PRIVATE = (
    "docker",
    "br-",
    "virbr",
    "veth",
    "cni",
    "flannel",
    "cali",
    "lxc",
    "lxd",
    "podman",
    "vmnet",
    "vboxnet",
)

# The variables with which a user names the interface, by the family of MPI.
CHOOSING = {
    "Open MPI": ("OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_oob_tcp_if_include"),
    "Open MPI 5": ("OMPI_MCA_btl_tcp_if_include", "PRTE_MCA_prte_if_include"),
    "other": ("HYDRA_IFACE", "FI_TCP_IFACE"),
}


@dataclass(frozen=True)
class Interface:
    """A network interface that is up; `speed` is in Mbit/s, None where the kernel does not know."""

    name: str
    address: str
    speed: int | None

    def __str__(self) -> str:
        rate = "" if self.speed is None else f", {self.speed / 1000:g} Gbit/s"
        return f"{self.name} ({self.address}{rate})"


def network(inquiry: Inquiry) -> Finding:
    """Says which interfaces MPI would use between hosts."""
    mpi = inquiry.launcher.mpi.name if inquiry.launcher else ""
    return judge_network(interfaces(), CHOOSING[_family(mpi)], inquiry.environ)


def interfaces() -> list[Interface]:
    """Lists the interfaces that have an address and lead to other hosts."""
    found = [Interface(path.name, _address(path.name), _speed(path)) for path in sorted(INTERFACES.iterdir())]
    return [each for each in found if each.address and not each.address.startswith("127.")]


def judge_network(found: Sequence[Interface], choosing: Sequence[str], environ: Mapping[str, str]) -> Finding:
    """Judges which interfaces would carry gradients between hosts.

    Args:
        found: Those that lead to other hosts.
        choosing: The variables in which this MPI looks for the user's choice.
        environ: Where they are read.
    """
    name, listed = "Network", ", ".join(map(str, found))
    chosen = next((environ[variable] for variable in choosing if environ.get(variable)), "")
    if chosen:
        return _judge_chosen(chosen, found, listed, choosing)
    if not found:
        return note(name, "No interface leads to other hosts; ranks on this one talk through memory.")
    if len(found) == 1:
        return ok(name, f"{listed}; it would be used between hosts")
    best = max(found, key=lambda each: (not each.name.startswith(PRIVATE), each.speed or 0))
    settings = "export " + " ".join(f"{variable}={best.name}" for variable in choosing)
    if any(each.name.startswith(PRIVATE) for each in found):
        return note(name, f"{listed}. Between hosts MPI may try those of containers and hang.", settings)
    return note(name, f"{listed}. Between hosts MPI would use any of them; to have one:", settings)


def _judge_chosen(chosen: str, found: Sequence[Interface], listed: str, choosing: Sequence[str]) -> Finding:
    names = [each.name for each in found]
    # A network may be named in place of an interface, as in 10.1.0.0/16: that is for MPI to match.
    strange = [word for word in chosen.split(",") if word not in names and "/" not in word and word != "lo"]
    if strange:
        told = f"Ranks are told to use {', '.join(strange)}, which has no address here"
        said = f"{told}; there is: {listed or 'none'}."
        return wrong("Network", said, f"unset {' '.join(choosing)}")
    return ok("Network", f"{listed}; between hosts {chosen} is used, as you chose")


def hostname(inquiry: Inquiry) -> Finding:
    """Checks that this host's name leads to an address, and one that other hosts can reach."""
    host = socket.gethostname()
    # Asked elsewhere because a name server that does not answer can hold a process for a minute.
    question = "import socket; print(socket.gethostbyname(sys.argv[1]))"
    answer = inquiry.ask(sys.executable, *safe_path.code(question), host)
    outward = sorted(interfaces(), key=lambda each: each.name.startswith(PRIVATE))
    reachable = outward[0].address if outward else ""
    return judge_hostname(host, answer.out.strip() if answer.code == 0 else "", reachable)


def judge_hostname(host: str, address: str, reachable: str) -> Finding:
    """Judges a host's name.

    Args:
        host: The name.
        address: What it resolves to; empty for nothing.
        reachable: The address under which other hosts would find it; empty where none does.
    """
    mend = f"sed -i '1i {reachable or '127.0.0.1'} {host}' /etc/hosts   # as root"
    if not address:
        return note(
            "Host name", f"{host} resolves to no address: MPI may wait for a name server or fail.", mend
        )
    if address.startswith("127.") and reachable:
        return note("Host name", f"{host} is {address}: enough alone, not to be found by other hosts.", mend)
    return ok("Host name", f"{host} is {address}")


def ssh(environ: Mapping[str, str]) -> Finding:
    """Checks for ssh, with which launchers reach other hosts where Slurm does not."""
    found = shutil.which("ssh", path=environ.get("PATH"))
    if found:
        return ok("ssh", f"{found}, to start ranks on other hosts")
    return note(
        "ssh", "Not found: no ranks on other hosts, except by Slurm.", "apt-get install openssh-client"
    )


def _family(mpi: str) -> str:
    if mpi == "Open MPI 5":
        return mpi
    return "Open MPI" if mpi.startswith("Open MPI") or not mpi else "other"


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
