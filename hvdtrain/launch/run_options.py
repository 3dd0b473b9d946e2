"""Define and check the options of `hvdtrain run`, and write the command line for given options."""

import itertools
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from hvdtrain.launch.hosts import LaunchError

# Options whose names differ from their fields.
_NAMES = {"num_proc": "-np", "hosts": "-H"}
# Fields that `command_line` writes after the options.
_WRITTEN_LAST = ("script", "args", "module", "variables", "mpirun", "srun")


@dataclass(frozen=True)
class RunOptions:
    """The options of `hvdtrain run`."""

    num_proc: int | None  # number of ranks to start; None for as many as the job or the hosts have slots
    script: str  # the Python script that each rank runs
    args: tuple[str, ...] = ()  # the arguments of the script
    # Hosts and their slots, "a:4,b:4"; this host if neither `hosts` nor `hostfile` is given.
    hosts: str | None = None
    hostfile: str | None = None  # a file with one host per line
    # "auto" binds each rank to an equal share of the cores if there are enough, "core" to one core, "none"
    # does not bind.
    bind: str = "auto"
    mpi_args: str = ""  # more options for the MPI launcher
    # A folder or file that every node of a Slurm job copies to its local disk before the ranks start.
    stage: str | None = None
    done_file: str | None = None  # a file to write once every rank has finished successfully
    dry_run: bool = False  # whether to print the command without running it
    verbose: bool = False  # whether to show the messages of TensorFlow and MPI too
    as_horovod: bool = False  # whether `import horovod` means hvdtrain in the script
    wrap: bool = False  # whether to distribute a script written for one process over the ranks
    scale_batch: bool = False  # with `wrap`, whether each rank keeps the full batch size of the script
    # Command that runs Python for a rank, such as "apptainer exec image.sif python3"; this Python by default.
    python: str = ""
    max_restarts: int = 0  # how often a failed job is restarted
    # The smallest number of ranks to restart with if hosts are lost; `num_proc` by default.
    min_np: int | None = None
    walltime: str | None = None  # how long the training may take from now, as Slurm writes it: "8:00:00"
    module: bool = False  # whether `script` is the name of a module, which is run as `python -m` runs it
    # Environment variables of the ranks, "NAME=value", or "NAME" for one that is set here.
    variables: tuple[str, ...] = ()
    mpirun: tuple[str, ...] = ()  # options for Open MPI's mpirun only
    srun: tuple[str, ...] = ()  # options for srun only

    @property
    def in_container(self) -> bool:
        """Whether the ranks may use another Python, and thus another MPI, than this process."""
        return bool(self.python) or any(word.startswith("--container") for word in self.srun)

    @property
    def ranks(self) -> int:
        """The number of ranks to start, after `with_ranks` has determined it."""
        assert self.num_proc is not None
        return self.num_proc


def command_line(options: RunOptions) -> str:
    """Return the command line for these options, for a message that says what to type."""
    words = ["hvdtrain", "run"]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in _WRITTEN_LAST or value in (field.default, None):
            continue
        name = _NAMES.get(field.name, f"--{field.name.replace('_', '-')}")
        words += [name] if value is True else [name, str(value)]
    for variable in options.variables:
        words += ["-x", variable]
    script = ["-m", options.script] if options.module else [options.script]
    return shlex.join([*words, *options.mpirun, *options.srun, *script, *options.args])


def set_variables(options: RunOptions) -> dict[str, str]:
    """Return the environment variables that are set on the command line, by -x or --mca."""
    given = [word.partition("=") for word in options.variables]
    own = {name: value for name, equals, value in given if equals}
    # srun does not read --mca, so the ranks get it as variables.
    positions = [index for index, word in enumerate(options.mpirun) if word == "--mca"]
    return own | {f"OMPI_MCA_{options.mpirun[index + 1]}": options.mpirun[index + 2] for index in positions}


def check_options(options: RunOptions, environ: Mapping[str, str]) -> None:
    """Raise a LaunchError if an option is invalid or options contradict each other."""
    _check_script(options)
    for word in options.variables:
        if "=" not in word and word not in environ:
            raise LaunchError(f"-x {word}: no variable of this name is set here; type -x {word}=value.")
    check_wrapping(options)
    _check_numbers(options)


def check_wrapping(options: RunOptions) -> None:
    """Raise a LaunchError if `wrap`, `scale_batch` and `as_horovod` contradict each other."""
    if options.scale_batch and not options.wrap:
        raise LaunchError("--scale-batch says how --wrap divides the work: type --wrap --scale-batch.")
    if options.wrap and options.as_horovod:
        raise LaunchError(
            "--as-horovod is for a script written for several ranks, --wrap for a script written for a single "
            "process: type one of them."
        )


def _check_numbers(options: RunOptions) -> None:
    ranks, fewest = options.ranks, options.min_np
    if ranks < 1:
        raise LaunchError(f"-np {ranks}: the number of ranks must be 1 or more.")
    if options.max_restarts < 0:
        raise LaunchError(f"--max-restarts {options.max_restarts} must be 0 or more.")
    if fewest is None:
        return
    if not options.max_restarts:
        raise LaunchError(
            "--min-np is the smallest number of ranks for a restart: type it with --max-restarts 3."
        )
    if not 1 <= fewest <= ranks:
        raise LaunchError(f"--min-np {fewest} must be from 1 to the {ranks} ranks of -np.")


def _check_script(options: RunOptions) -> None:
    path = Path(options.script)
    if options.module and path.suffix == ".py":
        script = command_line(replace(options, module=False))
        raise LaunchError(f"-m expects the name of a module, and {path} is a file: type {script}")
    if options.module or (path.is_file() and os.access(path, os.R_OK)):
        return
    if re.fullmatch(r"python[\d.]*", path.name) and options.args:
        raise LaunchError(f"Python is started for you: type {command_line(_without_python(options))}")
    if path.is_dir():
        raise LaunchError(f"{options.script} is a folder; expected a Python script.")
    problem = "cannot be read" if path.exists() else "is not there"
    raise LaunchError(f"The script {options.script} {problem} (looked for from {Path.cwd()}).")


def _without_python(options: RunOptions) -> RunOptions:
    """Return the options for a script that was typed as `python [flags] script` or `python -m module`."""
    args = options.args
    flags = tuple(itertools.takewhile(lambda word: re.fullmatch(r"-[bBdEiIOPqsSuv]+", word), args))
    if flags:
        options = replace(options, python=shlex.join([options.script, *flags]))
    module, args = args[len(flags) : len(flags) + 1] == ("-m",), args[len(flags) :]
    args = args[1:] if module else args
    return replace(options, module=module, script=args[0] if args else "train.py", args=args[1:])
