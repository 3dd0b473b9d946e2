"""The command of whichever MPI is found: what differs between them is a row of a table."""

import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvdtrain.launch.hosts import Host, LaunchError
from hvdtrain.launch.run_program import ask


@dataclass(frozen=True)
class Mpi:
    """One family of MPI launchers.

    Args:
        name: What people call it.
        version: What its `--version` shows, as a regular expression.
        unbound: Options under which any number of ranks starts on any number of cores. Binding is the
            ranks' own business (see binding.py).
        hosts: The option that takes hosts.
        slots_each: The option that takes the slots of every host; without it `hosts` takes `a:4,b:4`.
        forward: Options that carry the whole environment to other hosts.
        forward_each: The option that carries one variable to other hosts.
        as_root: Variables without which it refuses to run as root.
        pmi: What `srun --mpi=` must be for ranks of this MPI, the best first.
    """

    name: str
    version: str
    unbound: tuple[str, ...]
    hosts: str
    slots_each: str = ""
    forward: tuple[str, ...] = ()
    forward_each: str = ""
    as_root: Mapping[str, str] = field(default_factory=dict)
    pmi: tuple[str, ...] = ()


# Open MPI 4 reads the first two; 5 reads either pair, depending on the name it was called by.
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

# The variables by which MPIs, NCCL and libfabric learn which network interface to use; each ignores the others'.
INTERFACE = (
    "OMPI_MCA_btl_tcp_if_include",
    "OMPI_MCA_oob_tcp_if_include",
    "PRTE_MCA_prte_if_include",
    "HYDRA_IFACE",
    "FI_TCP_IFACE",
    "NCCL_SOCKET_IFNAME",
)

# What is true on one host only, or set afresh by what starts a process.
_LOCAL_NAMES = re.compile(
    r"HOST(NAME|TYPE)?|PWD|OLDPWD|SHLVL|_|TMPDIR|TERM|TTY|DISPLAY|SSH_.*|XDG_.*|DBUS_.*|SLURM.*|SRUN_.*|S?PMI_.*|"
    r"PMIX_.*|PRTE_.*|OMPI_(?!MCA_).*|BASH_FUNC_.*"
)


@dataclass(frozen=True)
class Launcher:
    """An MPI launcher that was found: its program and its row of the table."""

    program: str
    mpi: Mpi

    def settings(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Choose what the launcher itself needs: leave to run as root, its own folder on PATH."""
        settings = dict(self.mpi.as_root) if os.geteuid() == 0 else {}
        path = path_for(self.program, environ)
        return settings if path == environ.get("PATH") else settings | {"PATH": path}

    def command(self, ranks: int, hosts: Sequence[Host], forwarded: Iterable[str]) -> list[str]:
        """Write the launcher's part of the command line.

        Args:
            ranks: How many ranks to start.
            hosts: Where; nowhere in particular when empty.
            forwarded: The variables to carry to other hosts; none where all ranks are here.

        Returns:
            The program and its options, to be followed by the command of a rank.

        Raises:
            LaunchError: Where this MPI cannot be told these hosts.
        """
        names = list(forwarded)
        option = self.mpi.forward_each
        each = [word for name in names for word in (option, name)] if option else []
        return [
            self.program,
            "-np",
            str(ranks),
            *self.mpi.unbound,
            *self._places(hosts),
            *(self.mpi.forward if names else ()),
            *each,
        ]

    def _places(self, hosts: Sequence[Host]) -> list[str]:
        """Write the hosts in the one form or the other."""
        if not hosts:
            return []
        if not self.mpi.slots_each:
            return [self.mpi.hosts, ",".join(f"{host.name}:{host.slots}" for host in hosts)]
        if len({host.slots for host in hosts}) > 1:
            raise LaunchError(
                f"{self.mpi.name} takes hosts with the same number of slots each: give them so, or write a "
                '"machinefile" and type --mpi-args "-machinefile FILE" in place of -H.'
            )
        names = ",".join(host.name for host in hosts)
        return [self.mpi.hosts, names, self.mpi.slots_each, str(hosts[0].slots)]


def find(environ: Mapping[str, str] = os.environ) -> Launcher | None:
    """Find an MPI launcher: the one beside this Python first, so that a venv need not be activated.

    Args:
        environ: Where PATH is read.

    Returns:
        The launcher, or None where this machine has none.

    Raises:
        LaunchError: Where one is there but does not say which MPI it belongs to.
    """
    beside = str(Path(sys.executable).parent)
    for path in (beside, environ.get("PATH", "")):
        for name in ("mpirun", "mpiexec"):
            program = shutil.which(name, path=path)
            if program:
                return Launcher(program, _identify(program, environ))
    return None


def path_for(program: str, environ: Mapping[str, str]) -> str:
    """Put the launcher's own folder on PATH, where Intel's mpirun looks for its other half."""
    folder, path = str(Path(program).parent), environ.get("PATH", "")
    return path if folder in path.split(os.pathsep) else os.pathsep.join((folder, path))


def forwarded_names(environ: Iterable[str]) -> list[str]:
    """Choose the variables that mean the same on every host."""
    return sorted(name for name in environ if name.isidentifier() and not _LOCAL_NAMES.fullmatch(name))


def _identify(program: str, environ: Mapping[str, str]) -> Mpi:
    path = {"PATH": path_for(program, environ)}
    done = ask([program, "--version"], {**environ, **_AS_ROOT, **path}, 60)
    said = done.stdout + done.stderr
    for mpi in KNOWN:
        if re.search(mpi.version, said):
            return mpi
    first = said.strip().splitlines()[0] if said.strip() else "nothing"
    raise LaunchError(
        f"{program} was found, but its --version says {first!r}, which names none of "
        f"{', '.join(mpi.name for mpi in KNOWN)}: put the mpirun of one of these first on PATH."
    )
