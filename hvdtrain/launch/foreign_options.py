"""Understand the options of other launchers typed after `hvdtrain run`: horovodrun, mpirun, mpiexec, torchrun.

What means the same here is accepted; for the rest one sentence says what to type, with all other options kept.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.launchers.mpirun import INTERFACE
from hvdtrain.launch.run_options import RunOptions, command_line

# Returns our options with what another launcher's option means; takes ours and the words after that option.
Meaning = Callable[..., RunOptions]


@dataclass(frozen=True)
class Foreign:
    """An option of another launcher.

    Args:
        names: How it is written.
        values: How many words follow it.
        meaning: What it means in our options; nothing where the same is done here unasked.
        instead: What is done here in its place. An option that has this is refused, and `meaning` is what the
            command has that is shown.
    """

    names: tuple[str, ...]
    values: int = 0
    meaning: Meaning = lambda options, *words: options
    instead: str = ""


def understand(options: RunOptions, typed: Iterable[tuple[Foreign, Sequence[Any]]]) -> RunOptions:
    """Give our options what was typed in the words of other launchers.

    Args:
        options: What was asked for in our own words.
        typed: The other launchers' options, and for each time that one was typed its value, or a tuple of them.

    Returns:
        The options that mean all of it.

    Raises:
        LaunchError: For an option that means nothing here; the message has the command to type.
    """
    refused = []
    for option, times in typed:
        for value in times:
            words = value if isinstance(value, tuple) else (value,)
            try:
                options = option.meaning(options, *words)
            except ValueError as error:
                raise LaunchError(f"{option.names[0]} {' '.join(words)}: expected a number.") from error
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


def _variables(*words: str) -> Meaning:
    return lambda options: _with(options, *words)


def _megabytes(name: str) -> Meaning:
    return lambda options, value: _with(options, f"{name}={int(float(value) * 2**20)}")


def _interface(options: RunOptions, names: str) -> RunOptions:
    return _with(options, *(f"{name}={names}" for name in INTERFACE))


def _to_mpirun(name: str) -> Meaning:
    return lambda options, *words: replace(options, mpirun=(*options.mpirun, name, *words))


def _to_srun(name: str) -> Meaning:
    return lambda options, value: replace(options, srun=(*options.srun, f"{name}={value}"))


def _bind(options: RunOptions, to: str) -> RunOptions:
    if to in ("core", "none"):
        return replace(options, bind=to)
    return _to_mpirun("--bind-to")(replace(options, bind="none"), to)


def _restarts(options: RunOptions, *words: str) -> RunOptions:
    return replace(options, max_restarts=options.max_restarts or 3)


def _both(name: str) -> tuple[str, str]:
    """Open MPI takes its long options with one dash, too."""
    return f"--{name}", f"-{name}"


# What is done here unasked.
_DONE = ["--mpi", "--disable-cache", "--stall-check", "-genvall"]
_DONE += [*_both("oversubscribe"), *_both("allow-run-as-root")]

# Options of horovodrun with one value that are a variable.
_VALUES = {
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

# Those that switch a variable of that name on, and off with "--no-" before them.
_SWITCHES = ["hierarchical-allreduce", "hierarchical-allgather", "torus-allreduce", "autotune"]
_SWITCHES += ["timeline-mark-cycles", "mpi-threads-disable"]

# Open MPI's options of placement, and how many words follow each.
_PLACEMENT = {"map-by": 1, "rank-by": 1, "npernode": 1, "npersocket": 1, "rankfile": 1, "prefix": 1, "mca": 2}
_PLACEMENT |= {"report-bindings": 0, "display-map": 0, "display-allocation": 0, "use-hwthread-cpus": 0}
_PLACEMENT |= {"nolocal": 0, "pernode": 0, "bynode": 0, "bycore": 0, "byslot": 0, "nooversubscribe": 0}

# Options that only srun has: of binding, and of the containers of Pyxis.
_SRUN = ["cpu-bind", "gpu-bind", "mem-bind", "container-image", "container-mounts", "container-workdir"]
_SRUN += ["container-name", "container-env"]

_FIXED = (
    "the number of ranks is fixed here, and ranks that die are started again from the last commit, as often as "
    "--max-restarts says (docs/elastic.md)"
)
_PLACES = "-np is the number of all ranks, and -H a:4,b:4 says how many of them each host takes"
_SSH = "ssh reads it from ~/.ssh/config: under Host node* write"

FOREIGN = (
    Foreign(("-n", "--n", "--np", "--ntasks"), 1, _field("num_proc", int)),
    Foreign(("-host", "--host", "-hosts"), 1, _field("hosts")),
    Foreign(("-hostfile", "-machinefile", "--machinefile", "-f"), 1, _field("hostfile")),
    Foreign(("--min-num-proc",), 1, _field("min_np", int)),
    *(Foreign((name,)) for name in _DONE),
    *(Foreign((name,), 1, _variable(variable)) for name, variable in _VALUES.items()),
    *(
        Foreign((f"--{no}{name}",), 0, _variables(f"HOROVOD_{name.replace('-', '_').upper()}={value}"))
        for name in _SWITCHES
        for no, value in (("", 1), ("no-", 0))
    ),
    Foreign(("--no-stall-check",), 0, _variables("HVDTRAIN_STALL_SECONDS=0")),
    Foreign(("--log-with-timestamp", "--no-log-hide-timestamp"), 0, _variables("HOROVOD_LOG_HIDE_TIME=0")),
    Foreign(("--log-without-timestamp", "--log-hide-timestamp"), 0, _variables("HOROVOD_LOG_HIDE_TIME=1")),
    Foreign(("--fusion-threshold-mb",), 1, _megabytes("HOROVOD_FUSION_THRESHOLD")),
    # Neither NCCL nor Open MPI goes over InfiniBand then.
    Foreign(
        ("--tcp",), 0, _variables("NCCL_IB_DISABLE=1", "OMPI_MCA_pml=ob1", "OMPI_MCA_btl=^openib,uct,ofi")
    ),
    Foreign(("--network-interface", "--network-interfaces", "-iface"), 1, _interface),
    Foreign(("-x",), 1, _with),
    Foreign(("-genv", "-env"), 2, lambda options, name, value: _with(options, f"{name}={value}")),
    *(Foreign(_both(name), count, _to_mpirun(f"--{name}")) for name, count in _PLACEMENT.items()),
    Foreign(_both("bind-to"), 1, _bind),
    *(Foreign((f"--{name}",), 1, _to_srun(f"--{name}")) for name in _SRUN),
    Foreign(("--gloo",), instead="MPI starts the ranks and carries what they send; there is no Gloo here"),
    Foreign(("--gloo-timeout-seconds",), 1, instead="there is no Gloo here"),
    Foreign(
        ("--jsrun",),
        instead="mpirun starts the ranks here; jsrun itself starts them as docs/schedulers.md says",
    ),
    Foreign(("--start-timeout",), 1, instead="ranks have as much time to start as they need"),
    Foreign(("--output-filename",), 1, instead="all ranks print here; redirect it with > run.log 2>&1"),
    Foreign(_both("tag-output"), instead="lines of ranks other than 0 carry their number already"),
    Foreign(
        ("-prefix-timestamp", "--prefix-output-with-timestamp", *_both("timestamp-output")),
        instead="lines are shown as the ranks print them",
    ),
    Foreign(("--config-file",), 1, instead="its options are typed on the command line"),
    Foreign(("-p", "--ssh-port"), 1, instead=f"{_SSH} Port 2222"),
    Foreign(("-i", "--ssh-identity-file"), 1, instead=f"{_SSH} IdentityFile ~/.ssh/key"),
    Foreign(("--binding-args",), 1, instead="--bind auto, core or none binds ranks to cores"),
    Foreign(("-cb", "--check-build"), instead="hvdtrain doctor says what is built and whether it fits"),
    Foreign(("--max-np", "--max-num-proc"), 1, _restarts, _FIXED),
    Foreign(("--slots-per-host", "--slots"), 1, _restarts, _FIXED),
    Foreign(("--host-discovery-script",), 1, _restarts, _FIXED),
    Foreign(("--elastic-timeout",), 1, _restarts, _FIXED),
    Foreign(("--blacklist-cooldown-range",), 2, _restarts, _FIXED),
    Foreign(("--reset-limit",), 1, _field("max_restarts", int), _FIXED),
    Foreign(("-N", "-ppn", "-perhost"), 1, instead=_PLACES),
    Foreign(_both("wdir"), 1, instead="ranks work in the folder where you are: cd to it first"),
    *(
        Foreign((f"--{name}", f"--{name.replace('-', '_')}"), 1, instead=_PLACES)
        for name in ("nproc-per-node", "node-rank", "master-addr", "master-port")
    ),
    Foreign(("--nnodes",), 1, instead=_PLACES),
)
