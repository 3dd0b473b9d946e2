"""List the contenders of `hvdtrain bench step`, and the baseline to which each is compared."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hvdtrain.bench.contender import Contender

ALONE, WRAPPED, COMPUTE_ONLY = "alone", "wrapped, one rank", "compute only"
XLA = "alone, XLA"
TORCH, TF_KERAS = "torch alone", "tf_keras alone"

_WORK = "hvdtrain.bench.work"


@dataclass(frozen=True)
class StepContender:
    """A contender and its baseline.

    Args:
        contender: The contender.
        baseline: Name of the contender of the same framework whose processes train independently; its own name if
            it is that one.
        distributed: Whether its ranks train one model, so that they must end with the same weights.
    """

    contender: Contender
    baseline: str
    distributed: bool = False

    @property
    def name(self) -> str:
        """The contender's name."""
        return self.contender.name

    @property
    def strong(self) -> bool:
        """Whether it takes part in strong scaling, where the batch of one process is divided among all ranks."""
        return self.distributed or self.baseline == self.name


def step_contenders(
    model: str, engines: Sequence[str], peers: bool, xla: bool = False
) -> Iterator[StepContender]:
    """Yield all contenders.

    Args:
        model: The model to train.
        engines: The engines of hvdtrain.
        peers: Whether torch and tf_keras take part.
        xla: Whether hvdtrain and Keras alone also take part with `jit_compile=True`.
    """
    yield _keras(model, ALONE, "plain", independent=True)
    yield _keras(model, WRAPPED, "wrapped", "single", independent=True)
    for engine in engines:
        yield _keras(model, f"hvdtrain {engine}", "averaged", engine)
    yield _keras(model, COMPUTE_ONLY, "compute_only", engines[0])
    if xla:
        yield _keras(model, XLA, "plain", xla=True, independent=True)
        for engine in engines:
            yield _keras(model, f"hvdtrain {engine}, XLA", "averaged", engine, xla=True)
    if peers:
        yield _torch(model, TORCH, "plain", independent=True)
        yield _torch(model, "torch DDP", "ddp", stock=True)
        yield _tf_keras(model, TF_KERAS, "plain", independent=True)
        yield _tf_keras(model, "tf_keras Horovod", "horovod", "horovod", stock=True)
        yield _tf_keras(model, "tf_keras MultiWorker", "strategy", stock=True)


def _keras(
    model: str, name: str, mode: str, engine: str = "", xla: bool = False, **options: Any
) -> StepContender:
    needs = ("tensorflow", "keras", *(["horovod"] if engine == "horovod" else []))
    environ = {"KERAS_BACKEND": "tensorflow"} | ({"HVDTRAIN_ENGINE": engine} if engine else {})
    settings = {"model": model, "mode": mode, "xla": xla}
    contender = Contender(name, f"{_WORK}.keras_step", settings, environ, needs, **options)
    return StepContender(contender, XLA if xla else ALONE, distributed=mode == "averaged")


def _torch(model: str, name: str, mode: str, **options: Any) -> StepContender:
    settings = {"model": model, "mode": mode}
    contender = Contender(name, f"{_WORK}.torch_step", settings, needs=("torch",), **options)
    return StepContender(contender, TORCH, distributed=mode == "ddp")


def _tf_keras(model: str, name: str, mode: str, *needs: str, **options: Any) -> StepContender:
    environ = {"TF_USE_LEGACY_KERAS": "1"}
    needs = ("tensorflow", "tf_keras", *needs)
    settings = {"model": model, "mode": mode}
    contender = Contender(name, f"{_WORK}.tf_keras_step", settings, environ, needs, **options)
    return StepContender(contender, TF_KERAS, distributed=mode != "plain")
