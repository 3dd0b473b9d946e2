"""Translate options of other launchers typed after `hvdtrain run`: horovodrun, mpirun, mpiexec, torchrun.

An option with an equivalent is accepted. For any other, an error message shows the command to type instead, with
all other options kept.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.launchers.mpirun import INTERFACE
from hvdtrain.launch.run_options import RunOptions, command_line

# Takes the options of `hvdtrain run` and the values of a foreign option, and returns the new options.
Meaning = Callable[..., RunOptions]


@dataclass(frozen=True)
class ForeignOption:
    """An option of another launcher."""

    names: tuple[str, ...]  # its spellings
    values: int = 0  # the number of values that follow it
    # Its translation to options of `hvdtrain run`; by default it changes nothing.
    meaning: Meaning = lambda options, *values: options
    # Why it is rejected, and what to do instead; empty if it is accepted. The command shown in the error message
    # has the options that `meaning` returns.
    instead: str = ""


def apply_foreign_options(
    options: RunOptions, typed: Iterable[tuple[ForeignOption, Sequence[Any]]]
) -> RunOptions:
    """Apply each option of another launcher, with its values per occurrence, to the options of `hvdtrain run`.

    Raises:
        LaunchError: For an option without an equivalent; the message contains the command to type.
    """
    refused = []
    for option, occurrences in typed:
        for value in occurrences:
            values = value if isinstance(value, tuple) else (value,)
            try:
                options = option.meaning(options, *values)
            except ValueError as error:
                raise LaunchError(f"{option.names[0]} {' '.join(values)}: expected a number.") from error
        if option.instead:
            refused.append(f"{option.names[0]}: {option.instead}.")
    if refused:
        raise LaunchError(f"{' '.join(refused)} Type: {command_line(options)}")
    return options


def _field(name: str, read: Callable[[str], Any] = str) -> Meaning:
    return lambda options, value: replace(options, **{name: read(value)})


def _with(options: RunOptions, *variables: str) -> RunOptions:
    return replace(options, variables=(*options.variables, *variables))


def _variable(*names: str, read: Callable[[str], Any] = str) -> Meaning:
    return lambda options, value: _with(options, *(f"{name}={read(value)}" for name in names))


def _variables(*values: str) -> Meaning:
    return lambda options: _with(options, *values)


def _megabytes(text: str) -> int:
    return int(float(text) * 2**20)


def _to_mpirun(name: str) -> Meaning:
    return lambda options, *values: replace(options, mpirun=(*options.mpirun, name, *values))


def _to_srun(name: str) -> Meaning:
    return lambda options, value: replace(options, srun=(*options.srun, f"{name}={value}"))


def _bind(options: RunOptions, to: str) -> RunOptions:
    if to in ("core", "none"):
        return replace(options, bind=to)
    return _to_mpirun("--bind-to")(replace(options, bind="none"), to)


def _restarts(options: RunOptions, *values: str) -> RunOptions:
    return replace(options, max_restarts=options.max_restarts or 3)


def _both_spellings(name: str) -> tuple[str, str]:
    """Return both spellings of an option of Open MPI, which accepts one dash or two."""
    return f"--{name}", f"-{name}"


# Options that are the default here.
_DEFAULTS = ["--mpi", "--disable-cache", "--stall-check", "-genvall"]
_DEFAULTS += [*_both_spellings("oversubscribe"), *_both_spellings("allow-run-as-root")]

# Options of horovodrun with one value, and the variable that has the same effect.
_VARIABLES = {
    "--cycle-time-ms": "HOROVOD_CYCLE_TIME",
    "--cache-capacity": "HOROVOD_CACHE_CAPACITY",
    "--autotune-log-file": "HOROVOD_AUTOTUNE_LOG",
    "--autotune-warmup-samples": "HOROVOD_AUTOTUNE_WARMUP_SAMPLES",
    "--autotune-steps-per-sample": "HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE",
    "--autotune-bayes-opt-max-samples": "HOROVOD_AUTOTUNE_BAYES_OPT_MAX_SAMPLES",
    "--autotune-gaussian-process-noise": "HOROVOD_AUTOTUNE_GAUSSIAN_PROCESS_NOISE",
    "--timeline-filename": "HOROVOD_TIMELINE",
    "--stall-check-warning-time-seconds": "HVDTRAIN_STALL_SECONDS",
    "--stall-check-shutdown-time-seconds": "HVDTRAIN_STALL_ABORT_SECONDS",
    "--num-nccl-streams": "HOROVOD_NUM_NCCL_STREAMS",
    "--thread-affinity": "HOROVOD_THREAD_AFFINITY",
    "--log-level": "HOROVOD_LOG_LEVEL",
}

# Options that set a variable of the same name to 1, or to 0 with the prefix "--no-".
_SWITCHES = ["hierarchical-allreduce", "hierarchical-allgather", "torus-allreduce", "autotune"]
_SWITCHES += ["timeline-mark-cycles", "mpi-threads-disable"]

# Open MPI's placement options, and the number of values of each.
_PLACEMENT = {"map-by": 1, "rank-by": 1, "npernode": 1, "npersocket": 1, "rankfile": 1, "prefix": 1, "mca": 2}
_PLACEMENT |= {"report-bindings": 0, "display-map": 0, "display-allocation": 0, "use-hwthread-cpus": 0}
_PLACEMENT |= {"nolocal": 0, "pernode": 0, "bynode": 0, "bycore": 0, "byslot": 0, "nooversubscribe": 0}

# Options of srun only: binding, and containers of Pyxis.
_SRUN = ["cpu-bind", "gpu-bind", "mem-bind", "container-image", "container-mounts", "container-workdir"]
_SRUN += ["container-name", "container-env"]

# The spellings of options without a value that are rejected, and what to do instead.
_REFUSED_SWITCHES = {
    "--gloo": "ranks are started by MPI and communicate with MPI; there is no Gloo here",
    "--jsrun": "mpirun starts the ranks here; docs/schedulers.md describes how jsrun starts them",
    "--tag-output -tag-output": "lines of ranks other than 0 already begin with the rank",
    "-prefix-timestamp --prefix-output-with-timestamp --timestamp-output -timestamp-output": (
        "lines are printed without timestamps"
    ),
    "-cb --check-build": "hvdtrain doctor prints what is built and whether it fits this environment",
}
_RANKS_PER_HOST = "-np is the total number of ranks, and -H a:4,b:4 the number of ranks on each host"
_SSH = "ssh reads it from ~/.ssh/config: write under Host node*"
# The same for options with one value.
_REFUSED = {
    "--gloo-timeout-seconds": "there is no Gloo here",
    "--start-timeout": "ranks have as much time to start as they need",
    "--output-filename": "all output is printed here; redirect it with > run.log 2>&1",
    "--config-file": "type its options on the command line",
    "-p --ssh-port": f"{_SSH} Port 2222",
    "-i --ssh-identity-file": f"{_SSH} IdentityFile ~/.ssh/key",
    "--binding-args": "--bind auto, core or none binds ranks to cores",
    "-N -ppn -perhost": _RANKS_PER_HOST,
    "--wdir -wdir": "ranks run in the current folder: cd to it first",
    "--nproc-per-node --nproc_per_node": _RANKS_PER_HOST,
    "--node-rank --node_rank": _RANKS_PER_HOST,
    "--master-addr --master_addr": _RANKS_PER_HOST,
    "--master-port --master_port": _RANKS_PER_HOST,
    "--nnodes": _RANKS_PER_HOST,
}
_FIXED = (
    "the number of ranks is fixed here, and a failed job is restarted from its last commit up to "
    "--max-restarts times (docs/elastic.md)"
)

FOREIGN = (
    ForeignOption(("-n", "--n", "--np", "--ntasks"), 1, _field("num_proc", int)),
    ForeignOption(("-host", "--host", "-hosts"), 1, _field("hosts")),
    ForeignOption(("-hostfile", "-machinefile", "--machinefile", "-f"), 1, _field("hostfile")),
    ForeignOption(("--min-num-proc",), 1, _field("min_np", int)),
    *(ForeignOption((name,)) for name in _DEFAULTS),
    *(ForeignOption((name,), 1, _variable(variable)) for name, variable in _VARIABLES.items()),
    *(
        ForeignOption((f"--{no}{name}",), 0, _variables(f"HOROVOD_{name.replace('-', '_').upper()}={value}"))
        for name in _SWITCHES
        for no, value in (("", 1), ("no-", 0))
    ),
    ForeignOption(("--no-stall-check",), 0, _variables("HVDTRAIN_STALL_SECONDS=0")),
    ForeignOption(
        ("--log-with-timestamp", "--no-log-hide-timestamp"), 0, _variables("HOROVOD_LOG_HIDE_TIME=0")
    ),
    ForeignOption(
        ("--log-without-timestamp", "--log-hide-timestamp"), 0, _variables("HOROVOD_LOG_HIDE_TIME=1")
    ),
    ForeignOption(("--fusion-threshold-mb",), 1, _variable("HOROVOD_FUSION_THRESHOLD", read=_megabytes)),
    # Then neither NCCL nor Open MPI uses InfiniBand.
    ForeignOption(
        ("--tcp",), 0, _variables("NCCL_IB_DISABLE=1", "OMPI_MCA_pml=ob1", "OMPI_MCA_btl=^openib,uct,ofi")
    ),
    ForeignOption(("--network-interface", "--network-interfaces", "-iface"), 1, _variable(*INTERFACE)),
    ForeignOption(("-x",), 1, _with),
    ForeignOption(("-genv", "-env"), 2, lambda options, name, value: _with(options, f"{name}={value}")),
    *(
        ForeignOption(_both_spellings(name), count, _to_mpirun(f"--{name}"))
        for name, count in _PLACEMENT.items()
    ),
    ForeignOption(_both_spellings("bind-to"), 1, _bind),
    *(ForeignOption((f"--{name}",), 1, _to_srun(f"--{name}")) for name in _SRUN),
    *(ForeignOption(tuple(names.split()), 0, instead=text) for names, text in _REFUSED_SWITCHES.items()),
    *(ForeignOption(tuple(names.split()), 1, instead=text) for names, text in _REFUSED.items()),
    ForeignOption(("--max-np", "--max-num-proc"), 1, _restarts, _FIXED),
    ForeignOption(("--slots-per-host", "--slots"), 1, _restarts, _FIXED),
    ForeignOption(("--host-discovery-script",), 1, _restarts, _FIXED),
    ForeignOption(("--elastic-timeout",), 1, _restarts, _FIXED),
    ForeignOption(("--blacklist-cooldown-range",), 2, _restarts, _FIXED),
    ForeignOption(("--reset-limit",), 1, _field("max_restarts", int), _FIXED),
)
