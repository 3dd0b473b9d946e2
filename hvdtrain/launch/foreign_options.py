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
    """An option of another launcher.

    Args:
        names: Its spellings.
        values: The number of values that follow it.
        meaning: Its translation to options of `hvdtrain run`; by default it changes nothing.
        instead: Why it is rejected, and what to do instead; empty if it is accepted. The command shown in the error
            message has the options that `meaning` returns.
    """

    names: tuple[str, ...]
    values: int = 0
    meaning: Meaning = lambda options, *values: options
    instead: str = ""


def apply_foreign_options(
    options: RunOptions, typed: Iterable[tuple[ForeignOption, Sequence[Any]]]
) -> RunOptions:
    """Apply the options of other launchers to the options of `hvdtrain run`.

    Args:
        options: The options of `hvdtrain run`.
        typed: Each foreign option with its values, one value or tuple of values per occurrence.

    Returns:
        The combined options.

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
    def meaning(options: RunOptions, value: str) -> RunOptions:
        return replace(options, **{name: read(value)})

    return meaning


def _with(options: RunOptions, *variables: str) -> RunOptions:
    return replace(options, variables=(*options.variables, *variables))


def _variable(name: str) -> Meaning:
    return lambda options, value: _with(options, f"{name}={value}")


def _variables(*values: str) -> Meaning:
    return lambda options: _with(options, *values)


def _megabytes(name: str) -> Meaning:
    return lambda options, value: _with(options, f"{name}={int(float(value) * 2**20)}")


def _interface(options: RunOptions, names: str) -> RunOptions:
    return _with(options, *(f"{name}={names}" for name in INTERFACE))


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

_FIXED = (
    "the number of ranks is fixed here, and a failed job is restarted from its last commit up to "
    "--max-restarts times (docs/elastic.md)"
)
_RANKS_PER_HOST = "-np is the total number of ranks, and -H a:4,b:4 the number of ranks on each host"
_SSH = "ssh reads it from ~/.ssh/config: write under Host node*"

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
    ForeignOption(("--fusion-threshold-mb",), 1, _megabytes("HOROVOD_FUSION_THRESHOLD")),
    # Then neither NCCL nor Open MPI uses InfiniBand.
    ForeignOption(
        ("--tcp",), 0, _variables("NCCL_IB_DISABLE=1", "OMPI_MCA_pml=ob1", "OMPI_MCA_btl=^openib,uct,ofi")
    ),
    ForeignOption(("--network-interface", "--network-interfaces", "-iface"), 1, _interface),
    ForeignOption(("-x",), 1, _with),
    ForeignOption(("-genv", "-env"), 2, lambda options, name, value: _with(options, f"{name}={value}")),
    *(
        ForeignOption(_both_spellings(name), count, _to_mpirun(f"--{name}"))
        for name, count in _PLACEMENT.items()
    ),
    ForeignOption(_both_spellings("bind-to"), 1, _bind),
    *(ForeignOption((f"--{name}",), 1, _to_srun(f"--{name}")) for name in _SRUN),
    ForeignOption(
        ("--gloo",), instead="ranks are started by MPI and communicate with MPI; there is no Gloo here"
    ),
    ForeignOption(("--gloo-timeout-seconds",), 1, instead="there is no Gloo here"),
    ForeignOption(
        ("--jsrun",),
        instead="mpirun starts the ranks here; docs/schedulers.md describes how jsrun starts them",
    ),
    ForeignOption(("--start-timeout",), 1, instead="ranks have as much time to start as they need"),
    ForeignOption(
        ("--output-filename",),
        1,
        instead="all output is printed here; redirect it with > run.log 2>&1",
    ),
    ForeignOption(
        _both_spellings("tag-output"), instead="lines of ranks other than 0 already begin with the rank"
    ),
    ForeignOption(
        ("-prefix-timestamp", "--prefix-output-with-timestamp", *_both_spellings("timestamp-output")),
        instead="lines are printed without timestamps",
    ),
    ForeignOption(("--config-file",), 1, instead="type its options on the command line"),
    ForeignOption(("-p", "--ssh-port"), 1, instead=f"{_SSH} Port 2222"),
    ForeignOption(("-i", "--ssh-identity-file"), 1, instead=f"{_SSH} IdentityFile ~/.ssh/key"),
    ForeignOption(("--binding-args",), 1, instead="--bind auto, core or none binds ranks to cores"),
    ForeignOption(
        ("-cb", "--check-build"),
        instead="hvdtrain doctor prints what is built and whether it fits this environment",
    ),
    ForeignOption(("--max-np", "--max-num-proc"), 1, _restarts, _FIXED),
    ForeignOption(("--slots-per-host", "--slots"), 1, _restarts, _FIXED),
    ForeignOption(("--host-discovery-script",), 1, _restarts, _FIXED),
    ForeignOption(("--elastic-timeout",), 1, _restarts, _FIXED),
    ForeignOption(("--blacklist-cooldown-range",), 2, _restarts, _FIXED),
    ForeignOption(("--reset-limit",), 1, _field("max_restarts", int), _FIXED),
    ForeignOption(("-N", "-ppn", "-perhost"), 1, instead=_RANKS_PER_HOST),
    ForeignOption(_both_spellings("wdir"), 1, instead="ranks run in the current folder: cd to it first"),
    *(
        ForeignOption((f"--{name}", f"--{name.replace('-', '_')}"), 1, instead=_RANKS_PER_HOST)
        for name in ("nproc-per-node", "node-rank", "master-addr", "master-port")
    ),
    ForeignOption(("--nnodes",), 1, instead=_RANKS_PER_HOST),
)
