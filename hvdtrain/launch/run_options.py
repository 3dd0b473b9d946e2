"""What is asked of `hvdtrain run`: its options, their checks, and the command line that asks for them."""

import itertools
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from hvdtrain.launch.hosts import LaunchError

# Options whose names are not those of their fields.
_NAMES = {"num_proc": "-np", "hosts": "-H"}


@dataclass(frozen=True)
class RunOptions:
    """What was asked of `hvdtrain run`.

    Args:
        num_proc: How many ranks to start; None for as many as the job or the hosts have room for.
        script: The Python script that each rank runs.
        args: What the script finds in `sys.argv` after its name.
        hosts: Hosts and their slots, "a:4,b:4"; this host when neither they nor a file are given.
        hostfile: A file with one host a line.
        bind: "auto" gives each rank an equal share of the cores where there is one for each, "core" one
            core, "none" leaves ranks to roam.
        mpi_args: More options for the MPI launcher.
        stage: A folder or file that every node of a Slurm job copies to a disk of its own before the ranks start.
        done_file: Where to write, once every rank has come to its end, that they have.
        dry_run: Whether to print the command and stop.
        verbose: Whether to show TensorFlow's and MPI's own messages too.
        as_horovod: Whether `import horovod` means hvdtrain in the script.
        wrap: Whether the script knows nothing of ranks, and its work is to be divided among them.
        scale_batch: With `wrap`, whether each rank keeps the script's batch.
        python: What runs Python for a rank, "apptainer exec image.sif python3" for one; this Python by default.
        max_restarts: How often ranks that failed are started again.
        min_np: The smallest number of ranks to go on with when hosts are lost; `num_proc` by default.
        walltime: How long the training may take from now, as Slurm writes it: "8:00:00".
        module: Whether `script` is the name of a module, to be run as `python -m` runs it.
        variables: What the ranks find in their environment, "NAME=value"; "NAME" for one that is set here.
        mpirun: Options for Open MPI's mpirun, and for no other launcher.
        srun: Options for srun, and for no other launcher.
    """

    num_proc: int | None
    script: str
    args: tuple[str, ...] = ()
    hosts: str | None = None
    hostfile: str | None = None
    bind: str = "auto"
    mpi_args: str = ""
    stage: str | None = None
    done_file: str | None = None
    dry_run: bool = False
    verbose: bool = False
    as_horovod: bool = False
    wrap: bool = False
    scale_batch: bool = False
    python: str = ""
    max_restarts: int = 0
    min_np: int | None = None
    walltime: str | None = None
    module: bool = False
    variables: tuple[str, ...] = ()
    mpirun: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()

    @property
    def in_container(self) -> bool:
        """Whether the ranks may have another Python, and with it another MPI, than this process."""
        return bool(self.python) or any(word.startswith("--container") for word in self.srun)

    @property
    def ranks(self) -> int:
        """How many ranks to start, once `with_ranks` has found it out."""
        assert self.num_proc is not None
        return self.num_proc


def command_line(options: RunOptions) -> str:
    """Return the command that asks for these options, for a message that says what to type."""
    words = ["hvdtrain", "run"]
    for field in fields(options):
        value, name = (
            getattr(options, field.name),
            _NAMES.get(field.name, f"--{field.name.replace('_', '-')}"),
        )
        if field.name in ("script", "args", "module", "variables", "mpirun", "srun") or value in (
            field.default,
            None,
        ):
            continue
        words += [name] if value is True else [name, str(value)]
    for variable in options.variables:
        words += ["-x", variable]
    script = ["-m", options.script] if options.module else [options.script]
    return shlex.join([*words, *options.mpirun, *options.srun, *script, *options.args])


def set_variables(options: RunOptions) -> dict[str, str]:
    """Return the environment variables that were given a value on the command line."""
    given = [word.partition("=") for word in options.variables]
    own = {name: value for name, equals, value in given if equals}
    # srun starts no mpirun that would read --mca.
    at = [place for place, word in enumerate(options.mpirun) if word == "--mca"]
    return own | {f"OMPI_MCA_{options.mpirun[place + 1]}": options.mpirun[place + 2] for place in at}


def check_options(options: RunOptions, environ: Mapping[str, str]) -> None:
    """Raise a LaunchError where options are wrong in themselves or contradict each other.

    Args:
        options: What was asked for.
        environ: The environment that the job inherits.
    """
    _check_script(options)
    _check_variables(options, environ)
    check_wrapping(options)
    _check_numbers(options)


def check_wrapping(options: RunOptions) -> None:
    """Reject ways of running a script that contradict each other."""
    if options.scale_batch and not options.wrap:
        raise LaunchError("--scale-batch says how --wrap divides the work: type --wrap --scale-batch.")
    if options.wrap and options.as_horovod:
        raise LaunchError(
            "--as-horovod is for a script that trains on several ranks by itself, --wrap for one that knows "
            "nothing of ranks: type one of them."
        )


def _check_numbers(options: RunOptions) -> None:
    ranks, fewest = options.ranks, options.min_np
    if ranks < 1:
        raise LaunchError(f"-np {ranks} asks for no rank at all; it must be 1 or more.")
    if options.max_restarts < 0:
        raise LaunchError(f"--max-restarts {options.max_restarts} must be 0 or more.")
    if fewest is None:
        return
    if not options.max_restarts:
        raise LaunchError("--min-np says with how few ranks to start again: type it with --max-restarts 3.")
    if not 1 <= fewest <= ranks:
        raise LaunchError(f"--min-np {fewest} must be from 1 to the {ranks} ranks of -np.")


def _check_variables(options: RunOptions, environ: Mapping[str, str]) -> None:
    for word in options.variables:
        if "=" not in word and word not in environ:
            raise LaunchError(f"-x {word}: no variable of this name is set here; type -x {word}=value.")


def _check_script(options: RunOptions) -> None:
    path = Path(options.script)
    if options.module and path.suffix == ".py":
        script = command_line(replace(options, module=False))
        raise LaunchError(f"-m takes the name of a module, and {path} is a file: type {script}")
    if options.module or (path.is_file() and os.access(path, os.R_OK)):
        return
    if re.fullmatch(r"python[\d.]*", path.name) and options.args:
        raise LaunchError(f"Python is started for you: type {command_line(_without_python(options))}")
    if path.is_dir():
        raise LaunchError(f"{options.script} is a folder; expected a Python script.")
    what = "cannot be read" if path.exists() else "is not there"
    raise LaunchError(f"The script {options.script} {what} (looked for from {Path.cwd()}).")


def _without_python(options: RunOptions) -> RunOptions:
    """Return the options that mean what `python ...` in the place of the script means."""
    args = options.args
    flags = tuple(itertools.takewhile(lambda word: re.fullmatch(r"-[bBdEiIOPqsSuv]+", word), args))
    if flags:
        options = replace(options, python=shlex.join([options.script, *flags]))
    module, args = args[len(flags) : len(flags) + 1] == ("-m",), args[len(flags) :]
    args = args[1:] if module else args
    return replace(options, module=module, script=args[0] if args else "train.py", args=args[1:])
