"""Convert options of sbatch that count by task or by GPU into those that count by node."""

import re
from collections.abc import Mapping

from hvdtrain.batch.quantities import UNLIMITED, gpus, mebibytes
from hvdtrain.batch.submit_options import gpus_as_gres
from hvdtrain.launch.hosts import LaunchError

Options = dict[str, str | None]


def per_node(asked: Mapping[str, str | None], others: Mapping[str, str | None]) -> Options:
    """Return options of sbatch in which those that count by task or by GPU are replaced by those of a node.

    The templates, and the checks before a submission, count by node.

    Args:
        asked: The options that the user typed.
        others: The options of variables and of the profile.

    Returns:
        `asked`, with --gpus-per-task as --gres, --cpus-per-gpu as --cpus-per-task, --mem-per-gpu as --mem, and
        with the nodes that a number of tasks needs.

    Raises:
        LaunchError: If one is not a number, needs GPUs that are not asked for, or contradicts another option.
    """
    asked = dict(asked)
    total, ranks = _number(asked, "ntasks"), _number(asked, "ntasks-per-node")
    if total and ranks and "nodes" not in asked:
        asked["nodes"] = str(-(-total // ranks))
    nodes = _number({**others, **asked}, "nodes") or 1
    ranks = ranks or -(-total // nodes) or _number(others, "ntasks-per-node")
    asked = _gpus_per_task(asked, ranks or 1)
    gpu_count = gpus({**others, **asked}.get("gres") or "")[1]
    return _memory_per_gpu(_cpus_per_gpu(asked, gpu_count, ranks or gpu_count), gpu_count)


def _gpus_per_task(asked: Options, ranks: int) -> Options:
    if "gpus-per-task" not in asked:
        return asked
    value = asked.pop("gpus-per-task") or ""
    match = re.fullmatch(r"([A-Za-z][\w.-]*:)?(\d+)", value)
    if not match:
        raise LaunchError(
            f"--gpus-per-task={value} is not a number of GPUs: type 1, or with their kind a100:1."
        )
    of_node = f"{match[1] or ''}{int(match[2]) * ranks}"
    kind, count = gpus(asked.get("gres") or "")
    if count and (kind, count) != gpus(f"gpu:{of_node}"):
        raise LaunchError(
            f"--gpus-per-task={value} with {ranks} rank(s) a node means --gpus-per-node={of_node}, and "
            f"{asked['gres']} is typed for a node: type one of them."
        )
    return asked if count else gpus_as_gres({**asked, "gpus-per-node": of_node})


def _cpus_per_gpu(asked: Options, gpu_count: int, ranks: int) -> Options:
    if "cpus-per-gpu" not in asked:
        return asked
    _check(asked, "cpus-per-gpu", "cpus-per-task", gpu_count)
    cpus = _number(asked, "cpus-per-gpu") * gpu_count
    del asked["cpus-per-gpu"]
    return {**asked, "cpus-per-task": str(max(1, cpus // ranks))}


def _memory_per_gpu(asked: Options, gpu_count: int) -> Options:
    if "mem-per-gpu" not in asked:
        return asked
    _check(asked, "mem-per-gpu", "mem", gpu_count)
    value = asked.pop("mem-per-gpu") or ""
    memory = mebibytes(value)
    if memory is None or memory == UNLIMITED:
        raise LaunchError(
            f"--mem-per-gpu={value} is not an amount that Slurm accepts: type 16G, for example."
        )
    return {**asked, "mem": f"{memory * gpu_count:.0f}M"}


def _check(asked: Mapping[str, str | None], option: str, node_option: str, gpu_count: int) -> None:
    if not gpu_count:
        raise LaunchError(
            f"--{option}={asked[option]} counts by GPUs, and none are asked for: type --gpus-per-node=4 as well, "
            f"or --{node_option}."
        )
    if node_option in asked:
        raise LaunchError(f"--{option} and --{node_option} set the same limit: type one of them.")


def _number(options: Mapping[str, str | None], name: str) -> int:
    """Return the number of an option, of a range the minimum; 0 if the option is not set."""
    value = options.get(name)
    match = re.match(r"\d+", value or "")
    return int(match[0]) if match else 0
