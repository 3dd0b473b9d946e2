"""Who trains in `hvdtrain bench step`, and with whom each is compared."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hvdtrain.bench.contender import Contender

ALONE, WRAPPED, SILENT = "alone", "wrapped, one rank", "compute only"
XLA = "alone, XLA"
TORCH, TF_KERAS = "torch alone", "tf_keras alone"

_WORK = "hvdtrain.bench.work"


@dataclass(frozen=True)
class Entrant:
    """A contender and what it is compared with.

    Args:
        contender: Who.
        single: The name of the same framework's processes that know nothing of each other; its own, if it is they.
        together: Whether its ranks train one model, so that they must end with the same weights.
    """

    contender: Contender
    single: str
    together: bool = False

    @property
    def name(self) -> str:
        """The contender's name."""
        return self.contender.name

    @property
    def shares(self) -> bool:
        """Tells whether it takes part where the batch of one process is divided among all ranks."""
        return self.together or self.single == self.name


def entrants(model: str, engines: Sequence[str], peers: bool, xla: bool = False) -> Iterator[Entrant]:
    """Lists everyone who takes part.

    Args:
        model: What they train.
        engines: Which engines of hvdtrain.
        peers: Whether torch and tf_keras take part.
        xla: Whether the same takes part with `jit_compile=True`.
    """
    yield _ours(model, ALONE, "plain", alone=True)
    yield _ours(model, WRAPPED, "wrapped", "single", alone=True)
    for engine in engines:
        yield _ours(model, f"hvdtrain {engine}", "averaged", engine)
    yield _ours(model, SILENT, "silent", engines[0])
    if xla:
        yield _ours(model, XLA, "plain", xla=True, alone=True)
        for engine in engines:
            yield _ours(model, f"hvdtrain {engine}, XLA", "averaged", engine, xla=True)
    if peers:
        yield _torch(model, TORCH, "plain", alone=True)
        yield _torch(model, "torch DDP", "ddp", stock=True)
        yield _tf_keras(model, TF_KERAS, "plain", alone=True)
        yield _tf_keras(model, "tf_keras Horovod", "horovod", "horovod", stock=True)
        yield _tf_keras(model, "tf_keras MultiWorker", "strategy", stock=True)


def _ours(model: str, name: str, way: str, engine: str = "", xla: bool = False, **how: Any) -> Entrant:
    needs = ("tensorflow", "keras", *(["horovod"] if engine == "horovod" else []))
    environ = {"KERAS_BACKEND": "tensorflow"} | ({"HVDTRAIN_ENGINE": engine} if engine else {})
    settings = {"model": model, "way": way, "xla": xla}
    who = Contender(name, f"{_WORK}.keras_step", settings, environ, needs, **how)
    return Entrant(who, XLA if xla else ALONE, together=way == "averaged")


def _torch(model: str, name: str, way: str, **how: Any) -> Entrant:
    who = Contender(name, f"{_WORK}.torch_step", {"model": model, "way": way}, needs=("torch",), **how)
    return Entrant(who, TORCH, together=way == "ddp")


def _tf_keras(model: str, name: str, way: str, *needs: str, **how: Any) -> Entrant:
    environ = {"TF_USE_LEGACY_KERAS": "1"}
    needs = ("tensorflow", "tf_keras", *needs)
    who = Contender(name, f"{_WORK}.tf_keras_step", {"model": model, "way": way}, environ, needs, **how)
    return Entrant(who, TF_KERAS, together=way != "plain")
