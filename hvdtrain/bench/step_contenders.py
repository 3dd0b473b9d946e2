"""Define the options and the contenders of `hvdtrain bench step`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hvdtrain.bench.contender_job import Contender
from hvdtrain.bench.models import WORKLOADS
from hvdtrain.bench.scheduler import ENGINES, RankOptions, check_engines
from hvdtrain.launch.hosts import LaunchError

ALONE, WRAPPED, COMPUTE_ONLY = "alone", "wrapped, one rank", "compute only"
XLA = "alone, XLA"
TORCH, TF_KERAS = "torch alone", "tf_keras alone"

# What `--compression` takes: names in `hvd.Compression`, and after a colon the first argument, as in topk:0.01.
COMPRESSIONS = {
    "fp16": "",
    "bf16": "",
    "int8": r"\d+",
    "int4": r"\d+",
    "signsgd": r"\d+",
    "topk": r"\d+(\.\d+)?",
    "randomk": r"\d+(\.\d+)?",
    "powersgd": r"\d+",
}

# Scalings: each rank has its own batch; one batch is divided among all ranks.
WEAK, STRONG = "weak", "strong"


@dataclass(frozen=True)
class Options(RankOptions):
    """Options of `hvdtrain bench step`."""

    model: str = "cnn"  # one of `WORKLOADS`
    batch: int | None = None  # samples for each rank and step; the model's default if not given
    rounds: int = 6  # number of turns of each contender
    steps: int | None = None  # in a turn; as many as take about a second if not given
    engines: tuple[str, ...] = ENGINES  # of hvdtrain
    peers: bool = True  # torch and tf_keras take part
    compression: tuple[str, ...] = ()  # with which hvdtrain takes part too, and torch with its own
    every: tuple[int, ...] = ()  # steps after which `LocalSGD` and `DiLoCo`, which take part too, average
    xla: bool = False  # hvdtrain and Keras alone take part with `jit_compile=True` too
    fit: int | None = None  # steps of an epoch, if a turn is a whole epoch of `fit`

    @property
    def steps_per_turn(self) -> int | None:
        """Steps in a turn; None for as many as take about a second."""
        return self.fit or self.steps

    @property
    def weak_batch(self) -> int:
        """Samples for each rank and step in weak scaling, where each rank has its own batch."""
        return self.batch if self.batch is not None else WORKLOADS[self.model].batch

    @property
    def strong_batch(self) -> int:
        """Samples for each rank and step in strong scaling, where ranks share one batch; 0 if there are too few."""
        return self.weak_batch // self.ranks

    @property
    def scales_strongly(self) -> bool:
        """Whether strong scaling is measured too; not where the network is what is looked at."""
        others = self.fit or self.compression or self.every
        return self.ranks > 1 and self.strong_batch > 0 and not others


def check(options: Options) -> None:
    """Raise a LaunchError if an option cannot be measured."""
    check_model(options.model)
    check_engines(options.engines)
    for compression in options.compression:
        name, colon, argument = compression.partition(":")
        if name not in COMPRESSIONS or (colon and not re.fullmatch(COMPRESSIONS[name] or "none", argument)):
            raise LaunchError(
                f"--compression {compression} is not known; expected {', '.join(COMPRESSIONS)}, with an argument "
                "as in topk:0.01, several with commas between them."
            )
    for name, number in (
        ("-np", options.ranks),
        ("--batch", options.weak_batch),
        ("--rounds", options.rounds),
        ("--steps", options.steps),
        ("--fit", options.fit),
    ):
        if number is not None and number < 1:
            raise LaunchError(f"{name} {number} measures nothing; it must be 1 or more.")
    steps = options.steps_per_turn
    for every in options.every:
        if every < 1 or steps is None or steps % every:
            raise LaunchError(
                f"--every {every} needs --steps with a multiple of it, so that each round has the same averages."
            )
    if options.fit is not None and options.steps is not None:
        raise LaunchError(
            "--fit sets how many steps an epoch has, and a turn is one epoch: leave out --steps."
        )


def check_model(model: str) -> None:
    """Raise a LaunchError if there is no such model."""
    if model not in WORKLOADS:
        raise LaunchError(f"--model {model} is not known; expected one of {', '.join(WORKLOADS)}.")


@dataclass(frozen=True)
class StepContender(Contender):
    """A contender of `hvdtrain bench step`."""

    # The name of the contender of the same framework whose processes train independently; it may be this one.
    baseline: str = ALONE
    distributed: bool = False  # its ranks train one model, so that they must end with the same weights

    @property
    def strong(self) -> bool:
        """Whether it takes part in strong scaling, where the batch of one process is divided among all ranks."""
        return self.distributed or self.baseline == self.name


def step_contenders(options: Options) -> Iterator[StepContender]:
    """Yield all contenders."""
    model, engines = options.model, options.engines
    yield keras_contender(model, ALONE, "plain")
    yield keras_contender(model, WRAPPED, "wrapped", "single")
    for engine in engines:
        yield keras_contender(model, f"hvdtrain {engine}", "averaged", engine)
        for compression in options.compression:
            yield keras_contender(
                model, f"hvdtrain {engine}, {compression}", "averaged", engine, compression=compression
            )
        for every in options.every:
            for kind in ("LocalSGD", "DiLoCo"):
                name = f"hvdtrain {engine}, {kind}({every})"
                yield keras_contender(model, name, "averaged", engine, every=every, kind=kind)
    yield keras_contender(model, COMPUTE_ONLY, "compute_only", engines[0])
    if options.xla:
        yield keras_contender(model, XLA, "plain", xla=True)
        for engine in engines:
            yield keras_contender(model, f"hvdtrain {engine}, XLA", "averaged", engine, xla=True)
    if options.peers:
        yield _torch(model, TORCH, "plain")
        yield _torch(model, "torch DDP", "ddp")
        if options.compression:
            yield _torch(model, "torch DDP, fp16", "ddp", "fp16")
            yield _torch(model, "torch DDP, powersgd:4", "ddp", "powersgd")
        yield _tf_keras(model, TF_KERAS, "plain")
        yield _tf_keras(model, "tf_keras Horovod", "horovod", "horovod")
        yield _tf_keras(model, "tf_keras MultiWorker", "strategy")


def keras_contender(
    model: str, name: str, mode: str, engine: str = "", xla: bool = False, **reduction: Any
) -> StepContender:
    """Return a contender that trains with Keras 3.

    Args:
        model: One of `WORKLOADS`.
        name: The contender's name.
        mode: What takes part in a step, as in `keras_workers.keras_step`.
        engine: The engine of hvdtrain; empty without hvdtrain.
        xla: Whether XLA compiles the step.
        reduction: `compression` of gradients, as in `Options`; or `kind` and `every` of averages of weights.
    """
    return StepContender(
        name,
        "hvdtrain.bench.keras_workers:keras_step",
        {"model": model, "mode": mode, "xla": xla, **reduction},
        {"KERAS_BACKEND": "tensorflow", "HVDTRAIN_ENGINE": engine or None},
        ("tensorflow", "keras", *(["horovod"] if engine == "horovod" else [])),
        independent=mode in ("plain", "wrapped"),
        baseline=XLA if xla else ALONE,
        distributed=mode == "averaged",
    )


def _torch(model: str, name: str, mode: str, hook: str = "") -> StepContender:
    work, settings = "hvdtrain.bench.torch_worker:torch_step", {"model": model, "mode": mode, "hook": hook}
    return StepContender(name, work, settings, needs=("torch",), baseline=TORCH, **_peer(mode))


def _tf_keras(model: str, name: str, mode: str, *needs: str) -> StepContender:
    work, settings = "hvdtrain.bench.keras_workers:tf_keras_step", {"model": model, "mode": mode}
    environ, needs = {"TF_USE_LEGACY_KERAS": "1"}, ("tensorflow", "tf_keras", *needs)
    return StepContender(name, work, settings, environ, needs, baseline=TF_KERAS, **_peer(mode))


def _peer(mode: str) -> dict[str, Any]:
    """Return how a contender runs that does not use hvdtrain."""
    together = mode != "plain"
    return {"independent": not together, "stock": together, "distributed": together}
