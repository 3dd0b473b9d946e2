"""Turn what is asked for a task or a GPU into what is asked for a node, as the templates and their checks count."""

import re
from collections.abc import Mapping

from hvdtrain.batch.quantities import ENDLESS, gpus, mebibytes
from hvdtrain.batch.submit_options import as_resources
from hvdtrain.launch.hosts import LaunchError

Options = dict[str, str | None]


def per_node(asked: Mapping[str, str | None], said: Mapping[str, str | None]) -> Options:
    """Return the typed options of sbatch without those that count by task or by GPU.

    Args:
        asked: What was typed.
        said: What variables and the profile say besides.

    Returns:
        `asked`, with --gpus-per-task as --gres, --cpus-per-gpu as --cpus-per-task, --mem-per-gpu as --mem, and
        with the nodes that a number of tasks needs.

    Raises:
        LaunchError: If one of them is no number, lacks its GPUs or contradicts what was typed for a node.
    """
    asked = dict(asked)
    total, each = _number(asked, "ntasks"), _number(asked, "ntasks-per-node")
    if total and each and "nodes" not in asked:
        asked["nodes"] = str(-(-total // each))
    nodes = _number({**said, **asked}, "nodes") or 1
    ranks = each or -(-total // nodes) or _number(said, "ntasks-per-node")
    asked = _gpus_per_task(asked, ranks or 1)
    count = gpus({**said, **asked}.get("gres") or "")[1]
    return _memory_per_gpu(_cpus_per_gpu(asked, count, ranks or count), count)


def _gpus_per_task(asked: Options, ranks: int) -> Options:
    if "gpus-per-task" not in asked:
        return asked
    value = asked.pop("gpus-per-task") or ""
    match = re.fullmatch(r"([A-Za-z][\w.-]*:)?(\d+)", value)
    if not match:
        raise LaunchError(f"--gpus-per-task={value} is no number of GPUs: type 1, or with their kind a100:1.")
    whole = f"{match[1] or ''}{int(match[2]) * ranks}"
    kind, count = gpus(asked.get("gres") or "")
    if count and (kind, count) != gpus(f"gpu:{whole}"):
        raise LaunchError(
            f"--gpus-per-task={value} with {ranks} rank(s) a node means --gpus-per-node={whole}, and "
            f"{asked['gres']} is typed for a node: type one of them."
        )
    return asked if count else as_resources({**asked, "gpus-per-node": whole})


def _cpus_per_gpu(asked: Options, count: int, ranks: int) -> Options:
    each = _number(asked, "cpus-per-gpu")
    if "cpus-per-gpu" not in asked:
        return asked
    _check(asked, "cpus-per-gpu", "cpus-per-task", count)
    del asked["cpus-per-gpu"]
    return {**asked, "cpus-per-task": str(max(1, each * count // ranks))}


def _memory_per_gpu(asked: Options, count: int) -> Options:
    if "mem-per-gpu" not in asked:
        return asked
    _check(asked, "mem-per-gpu", "mem", count)
    value = asked.pop("mem-per-gpu") or ""
    each = mebibytes(value)
    if each is None or each == ENDLESS:
        raise LaunchError(f"--mem-per-gpu={value} is no amount that Slurm reads: type 16G, for example.")
    return {**asked, "mem": f"{each * count:.0f}M"}


def _check(asked: Mapping[str, str | None], option: str, instead: str, count: int) -> None:
    if not count:
        raise LaunchError(
            f"--{option}={asked[option]} counts by GPUs, and none are asked for: type --gpus-per-node=4 as well, "
            f"or --{instead}."
        )
    if instead in asked:
        raise LaunchError(f"--{option} and --{instead} say the same of a job: type one of them.")


def _number(options: Mapping[str, str | None], name: str) -> int:
    """Reads a number; of a range the least, and 0 where there is none."""
    value = options.get(name)
    match = re.match(r"\d+", value or "")
    return int(match[0]) if match else 0
