"""GPUs: what the driver has, what TensorFlow sees, and what hides one from the other."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hvdtrain.doctor.finding import Finding, note, ok
from hvdtrain.doctor.inquiry import Inquiry, NoAnswerError

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
GPU_TENSORFLOW = "pip install 'tensorflow[and-cuda]'"


def gpus(inquiry: Inquiry) -> Finding:
    """Compares the driver's GPUs with those that TensorFlow sees."""
    answer = inquiry.ask(*QUERY)
    cards = answer.out.strip().splitlines() if answer.code == 0 else []
    failure = answer.last_line if answer.code not in (0, 127) else ""
    try:
        stack = inquiry.stack
    except NoAnswerError:
        stack = {}
    return judge_gpus(cards, failure, stack, inquiry.environ)


def judge_gpus(
    cards: Sequence[str], failure: str, stack: Mapping[str, Any], environ: Mapping[str, str]
) -> Finding:
    """Judges the GPUs of this host.

    Args:
        cards: One line of `nvidia-smi` a GPU; none where there is no nvidia-smi.
        failure: What nvidia-smi said instead.
        stack: What TensorFlow saw: `gpus`, and `cuda` where it was built for them.
        environ: Where CUDA_VISIBLE_DEVICES is read.
    """
    seen = len(stack.get("gpus", ()))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    setting = "" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible!r}"
    if failure:
        mend = "modprobe nvidia   # as root, or ask who runs this machine"
        return note("GPUs", f"nvidia-smi fails: {failure}. TensorFlow sees {seen}{setting}.", mend)
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
    kinds = dict.fromkeys(card.strip() for card in cards)
    return (
        ", ".join(f"{sum(card.strip() == kind for card in cards)} x {kind}" for kind in kinds)
        or "no nvidia-smi"
    )
