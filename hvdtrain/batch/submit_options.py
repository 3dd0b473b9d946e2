"""Define the options of `hvdtrain submit`, and read the options of sbatch among them."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from hvdtrain.batch.quantities import gpus
from hvdtrain.batch.templates import read_options
from hvdtrain.launch.hosts import LaunchError

# Options of sbatch that are not accepted in --sbatch, and what to type instead. With some, sbatch would not submit.
_INSTEAD = {
    "test-only": "type --dry-run for it, before the script",
    "wait": "type --follow for it, before the script",
    "-W": "type --follow for it, before the script",
    "wrap": "name a Python script instead",
    "help": "type sbatch --help",
    "-h": "type sbatch --help",
    "usage": "type sbatch --usage",
    "version": "type sbatch --version",
    "-V": "type sbatch --version",
    # An option of srun that sbatch does not know.
    "cpu-bind": "type --cpu-bind=cores, before the script",
    # The templates start one rank for each GPU, so they need the number of GPUs of a node.
    "gpus": "type --gpus-per-node=4",
    "ntasks-per-gpu": "type --gpus-per-node=4",
}


@dataclass(frozen=True)
class SubmitOptions:
    """The options of `hvdtrain submit`; the profile or the template defines those that are None.

    Args:
        words: The script and its arguments; for a sweep preceded by the file of trials.
        asked: Options of sbatch that `hvdtrain submit` has too, by their long names.
        gpus_per_node: Number of GPUs of a node, or "kind:number".
        sbatch: More options for sbatch, as one quoted string.
        template: The name of a template, or the path of a file.
        preemptible: Whether to requeue the job, which continues from its checkpoint.
        cluster: The name or the file of the cluster profile.
        flags: Options of `hvdtrain run` for the script, such as --wrap.
        image: The image of the container.
        dry_run: Whether to print the command and stop.
        follow: Whether to show the log until the job has ended.
        force: Whether to submit although a check found a problem.
    """

    words: tuple[str, ...] = ()
    asked: Mapping[str, str] = field(default_factory=dict)
    gpus_per_node: str | None = None
    sbatch: str = ""
    template: str | None = None
    preemptible: bool = False
    cluster: str | None = None
    flags: tuple[str, ...] = ()
    image: str | None = None
    dry_run: bool = False
    follow: bool = False
    force: bool = False


def read_asked(options: SubmitOptions) -> dict[str, str | None]:
    """Return the options of sbatch given one by one together with those in --sbatch.

    Raises:
        LaunchError: If they contradict each other, or sbatch would not submit the script with them.
    """
    for name in [name for name, value in options.asked.items() if not value.strip()]:
        raise LaunchError(f"--{name} is empty: name a value, or leave it out. Is a shell variable not set?")
    try:
        more = read_options(shlex.split(options.sbatch))
    except ValueError as error:
        raise LaunchError(f"--sbatch={options.sbatch!r} cannot be parsed: {error}.") from error
    for name in {*more} & {*_INSTEAD}:
        dashed = name if name.startswith("-") else f"--{name}"
        raise LaunchError(f"--sbatch has {dashed}, which is not accepted there: {_INSTEAD[name]}.")
    typed: dict[str, str | None] = dict(options.asked)
    if options.gpus_per_node is not None:
        typed["gpus-per-node"] = options.gpus_per_node
    for name in {*more} & {*typed}:
        if more[name] != typed[name]:
            raise LaunchError(
                f"--{name} is given twice, as {typed[name]} and as {more[name]}: type one of them."
            )
    return gpus_as_gres({**typed, **more})


def gpus_as_gres(asked: dict[str, str | None]) -> dict[str, str | None]:
    """Replace --gpus-per-node by --gres, which gpu.sbatch uses: with both, Slurm would add the two numbers."""
    if "gpus-per-node" not in asked:
        return asked
    number, other = asked.pop("gpus-per-node") or "", asked.get("gres")
    if not re.fullmatch(r"([A-Za-z][\w.-]*:)?\d+", number):
        raise LaunchError(
            f"--gpus-per-node={number} is not a number of GPUs: type 4, or with their kind a100:4."
        )
    wanted = "" if gpus(f"gpu:{number}")[1] == 0 else f"gpu:{number}"
    return {**asked, "gres": ",".join(filter(None, (wanted, other))) or "none"}
