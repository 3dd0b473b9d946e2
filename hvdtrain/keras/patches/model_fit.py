"""`model.fit` on several ranks: they begin alike, end alike, and none waits for one that has failed."""

import contextlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from hvdtrain.collectives.engine import Call, Engine
from hvdtrain.collectives.single import SingleEngine
from hvdtrain.data import caches
from hvdtrain.data.callback_order import preceded
from hvdtrain.data.collective_errors import compare
from hvdtrain.data.fingerprint import BATCHES, Fingerprint
from hvdtrain.data.shard import Sharded
from hvdtrain.gradients.verification import Policy
from hvdtrain.keras import model_comparison
from hvdtrain.keras.callbacks import checkpoint
from hvdtrain.keras.callbacks.error_propagation import telling
from hvdtrain.keras.callbacks.membership import engine_of, optimizers_of
from hvdtrain.keras.checkpointing.callback_order import steps_passed_over
from hvdtrain.keras.optimizer.distributed import is_distributed
from hvdtrain.keras.patches import sharded_data
from hvdtrain.keras.progress import Progress
from hvdtrain.patching import replace_where_defined

_STEPS = (
    "Who comes to the end of training first would leave the others waiting. Give every rank the same number of "
    "batches and epochs: model.fit(hvd.shard((x, y), batch_size=...), ...) with the whole data on every rank, or "
    "cut all parts to the same length, or pass steps_per_epoch."
)
_VALIDATION = (
    "What the ranks decide by their logs would differ. Give validation_data on every rank or on none: "
    "validation_data=hvd.shard((x, y), batch_size=..., shuffle=False) divides it among them."
)
_METRICS = "Their logs would differ. Compile the model with the same metrics on every rank."
_ADVICE = {
    "the number of steps an epoch": _STEPS,
    "the number of epochs": _STEPS,
    "validation": _VALIDATION,
    "the list of metrics": _METRICS,
    "the number of cache files": "Call dataset.cache(path) on every rank or on none.",
}

_checks_data = True
_checks_validation = True
_installed = False


def install(check_data: bool = True) -> None:
    """Make `fit` of models with a distributed optimizer keep the ranks together. Once is enough.

    Args:
        check_data: Whether data that is the same on all ranks is worth a warning.
    """
    global _installed, _checks_data
    _checks_data = _checks_data and check_data
    if not _installed:
        _installed = True
        sharded_data.install()
        replace_where_defined(keras.Model, "fit", _in_step)


def let_each_validate() -> None:
    """Let ranks validate each for itself, or not at all, as scripts written for Horovod may."""
    global _checks_validation
    _checks_validation = False


def _in_step(fit: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(fit)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        with checkpoint.over(self, given):
            return begin(self, given)

    def begin(self: Any, given: dict[str, Any]) -> Any:
        engine = _engine(self)
        progress = Progress(steps_passed_over(given))
        if engine.size == 1:
            return fit(**{**given, "callbacks": preceded(self, given.get("callbacks"), progress)})
        fingerprint = Fingerprint.of(given) if _checks_data else None
        callback = InStep(engine, fingerprint, given)
        given["callbacks"] = preceded(self, given.get("callbacks"), callback)
        given["callbacks"] = preceded(self, given["callbacks"], progress)
        try:
            with (
                telling(engine, "model.fit", (Exception,)),
                sharded_data.watching(fingerprint) if fingerprint else contextlib.nullcontext(),
            ):
                history = fit(**given)
                engine.agree(Call("end of training"))  # no rank stops before the others
                return history
        finally:
            callback.leave(self)

    return run


class InStep(keras.callbacks.Callback):
    """Compares what the ranks are about to do, and where each of them is when an epoch or training ends.

    Args:
        engine: The ranks.
        fingerprint: Notes what the ranks train on; None if that is not compared.
        given: The arguments of the `fit`.
    """

    def __init__(self, engine: Engine, fingerprint: Fingerprint | None, given: Mapping[str, Any]) -> None:
        super().__init__()
        self._engine = engine
        self._fingerprint = fingerprint
        self._validates = given.get("validation_data") is not None or bool(given.get("validation_split"))
        self._first = given.get("initial_epoch", 0)
        self._asked = given.get("steps_per_epoch")
        own = [data for name in ("x", "validation_data") if not isinstance(data := given.get(name), Sharded)]
        self._caches = [path for data in own for path in caches.files_of(data)]
        self._epoch = self._steps = 0
        self._train: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Make sure that all ranks will take the same steps.

        Raises:
            MismatchError: On every rank, with what each has been given.
        """
        optimizers = [getattr(each, "inner_optimizer", each) for each in optimizers_of(self.model)]
        names = [each._hvdtrain_reducer.choose_name() for each in optimizers]
        self._engine.agree(Call(f"start of model.fit with {', '.join(names)}"))
        steps, epochs = self._asked or self.params.get("steps"), self.params.get("epochs")
        facts = {
            "the number of steps an epoch": "unknown" if steps is None else str(steps),
            "the number of epochs": f"from {self._first} to {epochs}",
            "the number of cache files": str(len(self._caches)),
        }
        if _checks_validation:
            facts["validation"] = "has data" if self._validates else "has none"
            facts["the list of metrics"] = _compiled_metrics(self.model)
        compare(self._engine, "model.fit", [*facts.items()], _ADVICE)
        if self._caches:
            caches.refuse_common(self._engine, "model.fit", self._caches)
        self._train = self.model.train_function
        self.model.train_function = self._step

    def leave(self, model: Any) -> None:
        """Leave the model as it was before `fit`, whether that ended well or not."""
        if self._train is not None:
            model.train_function, self._train = self._train, None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begin to count steps."""
        self._epoch, self._steps = epoch, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Compare the fingerprints as soon as they are complete."""
        self._steps = batch + 1
        if self._steps >= BATCHES:
            self._compare_data()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Make sure that all ranks are here, with logs of the same names.

        Raises:
            MismatchError: On every rank, if some ranks are still at work, or have other logs.
        """
        self._agree_on_end(sorted({_base(name) for name in logs or {}}) if _checks_validation else [])
        self._compare_data()
        if epoch == self._first and self.params.get("epochs", 0) > epoch + 1:
            model_comparison.compare_model(self._engine, self.model, f"after epoch {epoch + 1}")

    def on_train_end(self, logs: Any = None) -> None:
        """Make sure that all ranks end with the same model, before a callback of one rank may change it.

        Raises:
            MismatchError: On every rank, if some ranks are still at work, or hold other values.
        """
        self._engine.agree(Call("end of training"))
        # A script written for Horovod may take a single step to build its variables, and broadcast them then.
        if self._epoch > self._first or self._steps > Policy.from_environment().first:
            model_comparison.compare_model(self._engine, self.model, "at the end of model.fit")
        model_comparison.forget_model(self.model)

    def _step(self, iterator: Any) -> Any:
        """Stand before the model's own step, because of data that end early nobody else hears."""
        try:
            return self._train(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            self._agree_on_end([])
            raise

    def _agree_on_end(self, details: list[str]) -> None:
        where = (
            f"end of epoch {self._epoch + 1} after {self._steps} steps (give every rank as many batches: by "
            f"hvd.shard, or steps_per_epoch={self._steps})"
        )
        self._engine.agree(Call(where, tuple(details)))

    def _compare_data(self) -> None:
        fingerprint, self._fingerprint = self._fingerprint, None
        sentence = fingerprint.verdict(self._engine) if fingerprint is not None else None
        if sentence:
            self._engine.warn(sentence)


def _engine(model: Any) -> Engine:
    """Return the ranks that train a model together; this rank alone if its optimizer is not distributed."""
    if any(is_distributed(each) for each in vars(model).values()):
        return engine_of(model)
    return SingleEngine()


def _compiled_metrics(model: Any) -> str:
    """List the metrics that a model was compiled with, and where they are the same, the same on all ranks."""
    compiled = model._compile_metrics
    given = [] if compiled is None else [compiled._user_metrics, compiled._user_weighted_metrics]
    found = [each for each in keras.tree.flatten(given) if each is not None]
    return ", ".join(sorted(_base(_name(each)) for each in found)) or "none"


def _name(metric: Any) -> str:
    named = getattr(metric, "name", None) or getattr(metric, "__name__", None)
    return metric if isinstance(metric, str) else named or type(metric).__name__


def _base(name: str) -> str:
    """Leave out the number that Keras gives to the second metric of a kind in a process, and writes names out.

    A model that was loaded calls "mean_absolute_error" what `compile` was told as "mae".
    """
    validation, short = re.fullmatch(r"(val_)?(.*?)(?:_\d+)?", name, re.DOTALL).groups("")  # type: ignore[union-attr]
    try:
        found = keras.metrics.get("accuracy" if short == "acc" else short)
    except ValueError:
        return validation + short
    return validation + (getattr(found, "__name__", None) or type(found).__name__)
