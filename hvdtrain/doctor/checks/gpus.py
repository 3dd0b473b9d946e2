"""Check that TensorFlow sees the GPUs of the driver."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hvdtrain.doctor.finding import Finding, note, ok
from hvdtrain.doctor.probe_runner import ProbeError, ProbeRunner

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
GPU_TENSORFLOW = "pip install 'tensorflow[and-cuda]'"


def gpus(probes: ProbeRunner) -> Finding:
    """Compare the driver's GPUs with those that TensorFlow sees."""
    result = probes.run(*QUERY)
    cards = result.out.strip().splitlines() if result.code == 0 else []
    failure = result.last_line if result.code not in (0, 127) else ""
    try:
        stack = probes.stack
    except ProbeError:
        stack = {}
    return judge_gpus(cards, failure, stack, probes.environ)


def judge_gpus(
    cards: Sequence[str], failure: str, stack: Mapping[str, Any], environ: Mapping[str, str]
) -> Finding:
    """Judge the GPUs of this host.

    Args:
        cards: One line of `nvidia-smi` for each GPU; empty without nvidia-smi.
        failure: The error of nvidia-smi; empty if it did not fail.
        stack: What TensorFlow reports: the list `gpus`, and whether it was built with `cuda`.
        environ: The environment variables, of which CUDA_VISIBLE_DEVICES is read.
    """
    seen = len(stack.get("gpus", ()))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    setting = "" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible!r}"
    if failure:
        fix = "modprobe nvidia   # as root, or ask the administrator of this machine"
        return note("GPUs", f"nvidia-smi fails: {failure}. TensorFlow sees {seen}{setting}.", fix)
    if not cards and not seen:
        return ok("GPUs", f"none here; training runs on the cores{setting}")
    found = f"{_summary(cards)}; TensorFlow sees {seen}{setting}"
    expected = len(cards) if visible is None else min(len(cards), len(re.findall(r"[^,\s]+", visible)))
    if seen >= expected and seen > 0:
        return ok("GPUs", f"{found}; one rank a GPU: hvdtrain run -np {seen}")
    if not stack.get("cuda"):
        return note("GPUs", f"{found}: this TensorFlow was built without CUDA.", GPU_TENSORFLOW)
    if visible is not None:
        return note("GPUs", f"{found}: CUDA_VISIBLE_DEVICES hides some.", "unset CUDA_VISIBLE_DEVICES")
    return note("GPUs", f"{found}: it does not find its CUDA libraries.", GPU_TENSORFLOW)


def _summary(cards: Sequence[str]) -> str:
    models = Counter(card.strip() for card in cards)
    return ", ".join(f"{count} x {model}" for model, count in models.items()) or "no nvidia-smi"
