"""Train the same models with torch: in one process, or in several with DistributedDataParallel over Gloo."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, final

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from hvdtrain.bench.models import BLOCKS, HEADS, WIDTH, WORKLOADS
from hvdtrain.bench.worker import StepWorker, threads


def torch_step(settings: Mapping[str, Any]) -> StepWorker:
    """Build the model, the same on all ranks.

    Args:
        settings: `model`, one of `WORKLOADS`; `mode`: "plain" or "ddp"; `hook`: how DDP compresses gradients,
            "fp16" or "powersgd", or empty.
    """
    torch.set_num_threads(threads(settings))
    torch.manual_seed(0)
    steps = _TorchSteps(settings)
    return StepWorker(steps.run, steps.weights, settings["rank"])


def build(name: str) -> nn.Module:
    """Build one of `WORKLOADS`; its weights depend on the current random seed."""
    makers = {"resnet20": _resnet20, "cnn": _cnn, "mlp": _mlp, "vgg": _vgg, "transformer": _Transformer}
    return makers[name]()


def optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Return the same optimizer as in Keras for one of `WORKLOADS`."""
    workload = WORKLOADS[name]
    if workload.adam:
        return torch.optim.Adam(model.parameters(), workload.rate)
    return torch.optim.SGD(model.parameters(), workload.rate, 0.9)


@final
class _TorchSteps:
    """Runs steps in the usual training loop of torch."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._name, self._rank = settings["model"], settings["rank"]
        model: Any = build(self._name)
        self._model = model.to(memory_format=torch.channels_last)
        if settings["mode"] == "ddp":
            torch.distributed.init_process_group("gloo")
            self._model = nn.parallel.DistributedDataParallel(self._model)
            _compress(self._model, settings.get("hook", ""))
        self._optimizer = optimizer(self._name, self._model)
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
        batches = WORKLOADS[self._name].batches(size, self._rank)
        return [(_channels_first(torch.from_numpy(x)), torch.from_numpy(y).long()) for x, y in batches]


def _compress(model: Any, hook: str) -> None:
    if hook == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def _channels_first(inputs: torch.Tensor) -> torch.Tensor:
    """Return a view with channels first, as torch expects; in memory they stay last, which is faster on CPUs."""
    return inputs.movedim(-1, 1) if inputs.dim() == 4 else inputs


def _resnet20() -> nn.Module:
    blocks, channels = list[nn.Module](), 16
    for filters in (16, 32, 64):
        for _ in range(3):
            blocks.append(_Residual(channels, filters))
            channels = filters
    ending = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, WORKLOADS["resnet20"].classes)]
    return nn.Sequential(*_normalized(3, 16), *blocks, *ending)


class _Residual(nn.Module):
    """Two convolutions and a shortcut connection."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        strides = filters // channels
        first, second = _normalized(channels, filters, strides), _normalized(filters, filters)[:-1]
        self.convolutions = nn.Sequential(*first, *second)
        narrower = nn.Conv2d(channels, filters, 1, strides, bias=False)
        self.shortcut = narrower if strides > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.shortcut(x) + self.convolutions(x))


def _normalized(channels: int, filters: int, strides: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, filters, 3, strides, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(filters), nn.ReLU()]


def _cnn() -> nn.Module:
    layers = list[nn.Module]()
    for channels, filters in ((3, 48), (48, 64)):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    wide = [nn.Flatten(), nn.Linear(64 * 8 * 8, 1552), nn.ReLU()]
    return nn.Sequential(*layers, *wide, nn.Linear(1552, WORKLOADS["cnn"].classes))


def _mlp() -> nn.Module:
    widths = (*WORKLOADS["mlp"].shape, 2048, 2048, 2048, 2048)
    layers = list[nn.Module]()
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(2048, WORKLOADS["mlp"].classes))


def _vgg() -> nn.Module:
    layers, channels = list[nn.Module](), 3
    for filters, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += _normalized(channels, filters)
            channels = filters
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, WORKLOADS["vgg"].classes))


class _Transformer(nn.Module):
    """A causal language model."""

    def __init__(self) -> None:
        super().__init__()
        (length,), vocabulary = WORKLOADS["transformer"].shape, WORKLOADS["transformer"].classes
        block = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Parameter(torch.empty(length, WIDTH).uniform_(-0.05, 0.05))
        self.blocks = nn.TransformerEncoder(block, BLOCKS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.logits = nn.Linear(WIDTH, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(self.blocks(self.tokens(x) + self.positions, self.mask, is_causal=True))
