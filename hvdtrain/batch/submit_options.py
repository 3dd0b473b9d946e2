"""Define the options of `hvdtrain submit`, and convert those for sbatch to the form that the templates use."""

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hvdtrain.batch.sbatch_options import UNLIMITED, Options, first_number, gpus, mebibytes, read_options
from hvdtrain.launch.hosts import LaunchError

# Options of `hvdtrain submit` that are options of sbatch too, in the order in which sbatch gets them.
_ASKED = ["nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "time", "mem"]
_ASKED += ["gpus-per-task", "cpus-per-gpu", "mem-per-gpu"]
_ASKED += ["partition", "account", "qos", "job-name", "array", "gpus-per-node"]

# Options that are passed to `hvdtrain run`: flags, and those with a value.
_FLAGS = ("wrap", "scale-batch", "as-horovod")
_FOR_SRUN = ("cpu-bind", "gpu-bind")

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

_GPUS = re.compile(r"([A-Za-z][\w.-]*:)?(\d+)")


@dataclass(frozen=True)
class SubmitOptions:
    """The options of `hvdtrain submit`; the profile or the template defines those that are None."""

    words: tuple[str, ...] = ()  # the script and its arguments; for a sweep preceded by the file of trials
    asked: Mapping[str, str] = field(default_factory=dict)  # options of sbatch, by their long names
    sbatch: str = ""  # more options for sbatch, as one quoted string
    flags: tuple[str, ...] = ()  # options of `hvdtrain run` for the script, such as --wrap
    template: str | None = None
    preemptible: bool = False
    cluster: str | None = None
    image: str | None = None
    dry_run: bool = False
    follow: bool = False
    force: bool = False


def read_typed(typed: Mapping[str, Any]) -> SubmitOptions:
    """Sort the options of the command line into those of sbatch, of `hvdtrain run`, and of submit itself."""
    names = {field.name for field in fields(SubmitOptions)}
    own = {name: value for name, value in typed.items() if name in names}
    dashed = {name.replace("_", "-"): value for name, value in typed.items()}
    flags = [f"--{name}" for name in _FLAGS if dashed[name]]
    flags += [f"--{name}={dashed[name]}" for name in _FOR_SRUN if dashed[name]]
    asked = {name: str(dashed[name]) for name in _ASKED if dashed[name] is not None}
    return SubmitOptions(**own, flags=tuple(flags), asked=asked)


def read_asked(options: SubmitOptions, others: Mapping[str, str | None]) -> Options:
    """Return the options of sbatch given one by one together with those in --sbatch, counted by node.

    The templates, and the checks before a submission, count by node: GPUs become --gres, --cpus-per-gpu becomes
    --cpus-per-task and --mem-per-gpu --mem. `others` are the options in variables and in the profile.

    Raises:
        LaunchError: If options contradict each other, one is not a number or needs GPUs that are not asked for, or
            sbatch would not submit the script with them.
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
    for name in {*more} & {*options.asked}:
        if more[name] != options.asked[name]:
            raise LaunchError(
                f"--{name} is given twice, as {options.asked[name]} and as {more[name]}: type one of them."
            )
    return _per_node(gpus_as_gres({**options.asked, **more}), others)


def gpus_as_gres(asked: Options) -> Options:
    """Replace --gpus-per-node by --gres, which gpu.sbatch uses: with both, Slurm would add the two numbers."""
    if "gpus-per-node" not in asked:
        return asked
    number, other = asked.pop("gpus-per-node") or "", asked.get("gres")
    match = _GPUS.fullmatch(number)
    if not match:
        raise LaunchError(
            f"--gpus-per-node={number} is not a number of GPUs: type 4, or with their kind a100:4."
        )
    wanted = f"gpu:{number}" if int(match[2]) else ""
    return {**asked, "gres": ",".join(filter(None, (wanted, other))) or "none"}


def _per_node(asked: Options, others: Mapping[str, str | None]) -> Options:
    total, ranks = first_number(asked, "ntasks"), first_number(asked, "ntasks-per-node")
    if total and ranks and "nodes" not in asked:
        asked["nodes"] = str(math.ceil(total / ranks))
    nodes = first_number({**others, **asked}, "nodes") or 1
    ranks = ranks or math.ceil(total / nodes) or first_number(others, "ntasks-per-node")
    asked = _gpus_per_task(asked, ranks or 1)
    gpu_count = gpus({**others, **asked}.get("gres"))[1]
    return _memory_per_gpu(_cpus_per_gpu(asked, gpu_count, ranks or gpu_count), gpu_count)


def _gpus_per_task(asked: Options, ranks: int) -> Options:
    if "gpus-per-task" not in asked:
        return asked
    value = asked.pop("gpus-per-task") or ""
    match = _GPUS.fullmatch(value)
    if not match:
        raise LaunchError(
            f"--gpus-per-task={value} is not a number of GPUs: type 1, or with their kind a100:1."
        )
    of_node = f"{match[1] or ''}{int(match[2]) * ranks}"
    kind, count = gpus(asked.get("gres"))
    if count and (kind, count) != gpus(f"gpu:{of_node}"):
        raise LaunchError(
            f"--gpus-per-task={value} with {ranks} rank(s) a node means --gpus-per-node={of_node}, and "
            f"{asked['gres']} is typed for a node: type one of them."
        )
    return asked if count else gpus_as_gres({**asked, "gpus-per-node": of_node})


def _cpus_per_gpu(asked: Options, gpu_count: int, ranks: int) -> Options:
    if "cpus-per-gpu" not in asked:
        return asked
    _check_per_gpu(asked, "cpus-per-gpu", "cpus-per-task", gpu_count)
    cpus = first_number(asked, "cpus-per-gpu") * gpu_count
    del asked["cpus-per-gpu"]
    return {**asked, "cpus-per-task": str(max(1, cpus // ranks))}


def _memory_per_gpu(asked: Options, gpu_count: int) -> Options:
    if "mem-per-gpu" not in asked:
        return asked
    _check_per_gpu(asked, "mem-per-gpu", "mem", gpu_count)
    value = asked.pop("mem-per-gpu") or ""
    memory = mebibytes(value)
    if memory is None or memory == UNLIMITED:
        raise LaunchError(
            f"--mem-per-gpu={value} is not an amount that Slurm accepts: type 16G, for example."
        )
    return {**asked, "mem": f"{memory * gpu_count:.0f}M"}


def _check_per_gpu(asked: Mapping[str, str | None], option: str, node_option: str, gpu_count: int) -> None:
    if not gpu_count:
        raise LaunchError(
            f"--{option}={asked[option]} counts by GPUs, and none are asked for: type --gpus-per-node=4 as well, "
            f"or --{node_option}."
        )
    if node_option in asked:
        raise LaunchError(f"--{option} and --{node_option} set the same limit: type one of them.")
