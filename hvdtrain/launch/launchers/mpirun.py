"""Find an MPI launcher and write its command line; a table describes how the MPIs differ."""

import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvdtrain.launch.hosts import Host, LaunchError, run_captured


@dataclass(frozen=True)
class Mpi:
    """One family of MPI launchers."""

    name: str  # its name
    version: str  # regular expression for the output of `--version`
    # Options that allow any number of ranks on any number of cores, without binding. Ranks bind themselves
    # (see cores.py).
    unbound: tuple[str, ...]
    hosts: str  # the option for the hosts
    slots_each: str = ""  # the option for the number of slots of each host; if empty, `hosts` takes `a:4,b:4`
    forward: tuple[str, ...] = ()  # options that forward the whole environment to other hosts
    forward_each: str = ""  # the option that forwards one variable to other hosts
    # Variables without which it refuses to run as root.
    as_root: Mapping[str, str] = field(default_factory=dict)
    pmi: tuple[str, ...] = ()  # values of `srun --mpi=` for ranks of this MPI, the best first


# Open MPI 4 reads the first two; 5 reads either pair, depending on the name of the program (mpirun or prterun).
_AS_ROOT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}

# The first row whose version matches wins.
KNOWN = (
    Mpi(
        "Open MPI 4",
        r"\(Open MPI\) [1-4]\.",
        unbound=("--oversubscribe", "--map-by", "slot", "--bind-to", "none"),
        hosts="-H",
        forward_each="-x",
        as_root=_AS_ROOT,
        pmi=("pmix",),
    ),
    Mpi(
        "Open MPI 5",
        r"\(Open MPI\)|PRRTE|prterun",
        unbound=("--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"),
        hosts="-H",
        forward_each="-x",
        as_root=_AS_ROOT,
        pmi=("pmix",),
    ),
    Mpi(
        "Intel MPI",
        r"Intel\(R\) MPI",
        unbound=("-genv", "I_MPI_PIN", "0"),
        hosts="-hosts",
        slots_each="-ppn",
        forward=("-genvall",),
        pmi=("pmi2",),
    ),
    Mpi(
        "MPICH",
        r"HYDRA|Hydra|MPICH|MVAPICH",
        unbound=("-bind-to", "none"),
        hosts="-hosts",
        forward=("-genvall",),
        pmi=("pmi2",),
    ),
)

# Variables that name the network interface, one for each MPI, NCCL and libfabric; each ignores the others.
INTERFACE = (
    "OMPI_MCA_btl_tcp_if_include",
    "OMPI_MCA_oob_tcp_if_include",
    "PRTE_MCA_prte_if_include",
    "HYDRA_IFACE",
    "FI_TCP_IFACE",
    "NCCL_SOCKET_IFNAME",
)

# Variables that are valid on one host only, or that the launcher sets for each process.
_LOCAL_NAMES = re.compile(
    r"HOST(NAME|TYPE)?|PWD|OLDPWD|SHLVL|_|TMPDIR|TERM|TTY|DISPLAY|SSH_.*|XDG_.*|DBUS_.*|SLURM.*|SRUN_.*|S?PMI_.*|"
    r"PMIX_.*|PRTE_.*|OMPI_(?!MCA_).*|BASH_FUNC_.*"
)


@dataclass(frozen=True)
class Launcher:
    """An installed MPI launcher: its program and its row of the table."""

    program: str
    mpi: Mpi

    def settings(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that the launcher needs: permission to run as root, its own folder on PATH."""
        settings = dict(self.mpi.as_root) if os.geteuid() == 0 else {}
        path = path_for(self.program, environ)
        return settings if path == environ.get("PATH") else settings | {"PATH": path}

    def command(self, ranks: int, hosts: Sequence[Host], forwarded: Sequence[str]) -> list[str]:
        """Return the program and its options; the command of a rank follows them.

        Args:
            ranks: The number of ranks to start.
            hosts: The hosts; empty for this host.
            forwarded: The variables to forward to other hosts; empty if all ranks are on this host.
        """
        command = [self.program, "-np", str(ranks), *self.mpi.unbound, *self._host_options(hosts)]
        if forwarded:
            command += self.mpi.forward
        for name in forwarded if self.mpi.forward_each else ():
            command += [self.mpi.forward_each, name]
        return command

    def _host_options(self, hosts: Sequence[Host]) -> list[str]:
        """Return the options for the hosts, with slots per host or one number of slots for all."""
        if not hosts:
            return []
        if not self.mpi.slots_each:
            return [self.mpi.hosts, ",".join(f"{host.name}:{host.slots}" for host in hosts)]
        if len({host.slots for host in hosts}) > 1:
            raise LaunchError(
                f"{self.mpi.name} requires the same number of slots on each host: change -H, or write a "
                '"machinefile" and type --mpi-args "-machinefile FILE" in place of -H.'
            )
        names = ",".join(host.name for host in hosts)
        return [self.mpi.hosts, names, self.mpi.slots_each, str(hosts[0].slots)]


def find(environ: Mapping[str, str] = os.environ) -> Launcher | None:
    """Find an MPI launcher: first in the folder of this Python, so that a venv need not be activated.

    Raises:
        LaunchError: If a launcher is found whose `--version` names no known MPI.
    """
    python_folder = str(Path(sys.executable).parent)
    for path in (python_folder, environ.get("PATH", "")):
        for name in ("mpirun", "mpiexec"):
            program = shutil.which(name, path=path)
            if program:
                return Launcher(program, _identify(program, environ))
    return None


def path_for(program: str, environ: Mapping[str, str]) -> str:
    """Return PATH with the launcher's own folder, in which Intel's mpirun looks for its helper programs."""
    folder, path = str(Path(program).parent), environ.get("PATH", "")
    return path if folder in path.split(os.pathsep) else os.pathsep.join((folder, path))


def forwarded_names(environ: Iterable[str]) -> list[str]:
    """Return the variables that are valid on every host."""
    return sorted(name for name in environ if name.isidentifier() and not _LOCAL_NAMES.fullmatch(name))


def _identify(program: str, environ: Mapping[str, str]) -> Mpi:
    path = {"PATH": path_for(program, environ)}
    done = run_captured([program, "--version"], {**environ, **_AS_ROOT, **path}, 60)
    output = done.stdout + done.stderr
    for mpi in KNOWN:
        if re.search(mpi.version, output):
            return mpi
    first = output.strip().splitlines()[0] if output.strip() else "nothing"
    raise LaunchError(
        f"{program} was found, but its --version says {first!r}, which names none of "
        f"{', '.join(mpi.name for mpi in KNOWN)}: put the mpirun of one of these first on PATH."
    )
