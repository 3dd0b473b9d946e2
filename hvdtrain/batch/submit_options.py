"""What was asked of `hvdtrain submit`, and the options of sbatch in it."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from hvdtrain.batch.quantities import gpus
from hvdtrain.batch.templates import read_options
from hvdtrain.launch.hosts import LaunchError

# Options of sbatch with which it would not submit or not come back, or whose place is elsewhere.
_ELSEWHERE = {
    "test-only": "type --dry-run for it, before the script",
    "wait": "type --follow for it, before the script",
    "-W": "type --follow for it, before the script",
    "wrap": "name a Python script instead",
    "help": "type sbatch --help",
    "-h": "type sbatch --help",
    "usage": "type sbatch --usage",
    "version": "type sbatch --version",
    "-V": "type sbatch --version",
    # srun reads them, and sbatch does not know them.
    "cpu-bind": "type --cpu-bind=cores, before the script",
    # The templates start one rank a GPU, so they must know what a node has.
    "gpus": "type --gpus-per-node=4",
    "ntasks-per-gpu": "type --gpus-per-node=4",
}


@dataclass(frozen=True)
class SubmitOptions:
    """What was asked of `hvdtrain submit`; what is None is left to the profile and the template.

    Args:
        words: The script and its arguments; for a sweep the file of trials before them.
        asked: Options of sbatch that have an option of their own, by their long names.
        gpus_per_node: GPUs a node, or "kind:number".
        sbatch: More options for sbatch, as one quoted string.
        template: The name of a template, or a file.
        preemptible: Whether the job shall be requeued and go on from its checkpoint.
        cluster: The profile, by name or file.
        flags: Options of `hvdtrain run` for the script, such as --wrap.
        image: The container's image.
        dry_run: Whether to print the command and stop.
        follow: Whether to show the log until the job has ended.
        force: Whether to submit although a check objects.
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
    """Joins the options of sbatch that were typed one by one with those in --sbatch.

    Raises:
        LaunchError: If they contradict each other, or would keep sbatch from submitting the script.
    """
    for name in [name for name, value in options.asked.items() if not value.strip()]:
        raise LaunchError(f"--{name} is empty: name a value, or leave it out. Is a shell variable not set?")
    try:
        more = read_options(shlex.split(options.sbatch))
    except ValueError as error:
        raise LaunchError(f"--sbatch={options.sbatch!r} cannot be taken apart: {error}.") from error
    for name in {*more} & {*_ELSEWHERE}:
        dashed = name if name.startswith("-") else f"--{name}"
        raise LaunchError(f"--sbatch has {dashed}, which has no place there: {_ELSEWHERE[name]}.")
    typed: dict[str, str | None] = dict(options.asked)
    if options.gpus_per_node is not None:
        typed["gpus-per-node"] = options.gpus_per_node
    for name in {*more} & {*typed}:
        if more[name] != typed[name]:
            raise LaunchError(
                f"--{name} is given twice, as {typed[name]} and as {more[name]}: type one of them."
            )
    return as_resources({**typed, **more})


def as_resources(asked: dict[str, str | None]) -> dict[str, str | None]:
    """Asks for GPUs in the words of gpu.sbatch, because Slurm adds --gpus-per-node to a --gres."""
    if "gpus-per-node" not in asked:
        return asked
    number, other = asked.pop("gpus-per-node") or "", asked.get("gres")
    if not re.fullmatch(r"([A-Za-z][\w.-]*:)?\d+", number):
        raise LaunchError(
            f"--gpus-per-node={number} is no number of GPUs: type 4, or with their kind a100:4."
        )
    wanted = "" if gpus(f"gpu:{number}")[1] == 0 else f"gpu:{number}"
    return {**asked, "gres": ",".join(filter(None, (wanted, other))) or "none"}
