"""Train with torch: in one process, or in several with DistributedDataParallel over Gloo."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import numpy as np
import torch
from torch import nn

from hvdtrain.bench.models import torch_models
from hvdtrain.bench.models.workloads import WORKLOADS
from hvdtrain.bench.work.step_worker import StepWorker, threads

DDP = "ddp"


def prepare(settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict]:
    """Build the model, the same on all ranks.

    Args:
        settings: `model`, one of `WORKLOADS`; `mode`: "plain" or "ddp".

    Returns:
        A function that answers requests.
    """
    torch.set_num_threads(threads(settings))
    torch.manual_seed(0)
    steps = _TorchSteps(settings)
    return StepWorker(steps.run, steps.weights, settings["rank"])


@final
class _TorchSteps:
    """Runs steps in the usual training loop of torch."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        model: Any = torch_models.build(settings["model"])
        self._model = model.to(memory_format=torch.channels_last)
        if settings["mode"] == DDP:
            torch.distributed.init_process_group("gloo")
            self._model = nn.parallel.DistributedDataParallel(self._model)
        self._optimizer = torch_models.optimizer(settings["model"], self._model)
        self._batches: dict[int, Iterator[tuple[torch.Tensor, torch.Tensor]]] = {}

    def run(self, batch: int, steps: int) -> float:
        if batch not in self._batches:
            self._batches[batch] = itertools.cycle(self._make_batches(batch))
        for inputs, labels in itertools.islice(self._batches[batch], steps):
            self._optimizer.zero_grad()
            outputs = self._model(inputs)
            loss = nn.functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())
            loss.backward()
            self._optimizer.step()
        return loss.item()

    def weights(self) -> list[np.ndarray]:
        return [param.detach().numpy() for param in self._model.parameters()]

    def _make_batches(self, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batches = WORKLOADS[self._settings["model"]].batches(size, self._settings["rank"])
        return [(_channels_first(torch.from_numpy(x)), torch.from_numpy(y).long()) for x, y in batches]


def _channels_first(inputs: torch.Tensor) -> torch.Tensor:
    """Return a view with channels first, as torch expects; in memory they stay last, which is faster on CPUs."""
    return inputs.movedim(-1, 1) if inputs.dim() == 4 else inputs
