"""Compare the ranks during `Model.fit`, so that a difference or an error ends training on all ranks.

Keras: `Model.fit` trains until the data of this process ends or an exception is raised in this process.

On several ranks: if one rank has fewer steps or epochs, or raises an exception, the others wait for its
gradients forever. If validation data, metrics or logs differ, callbacks such as EarlyStopping decide
differently on each rank.

Replacement: for a model with a distributed optimizer, `fit` compares the arguments before training, the
position and the names of the logs after each epoch, the variables after the first epoch and at the end, and
sends an exception of one rank to the others. With a single rank it only records epoch and step in the
heartbeat. `hvd.callbacks.Checkpoint` restores and saves within this `fit`.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from hvdtrain.collectives.engine import Call, Engine
from hvdtrain.collectives.single import SingleEngine
from hvdtrain.data import dataset_graph
from hvdtrain.data.adapters import preceded
from hvdtrain.data.collective_errors import compare
from hvdtrain.data.fingerprint import BATCHES, Fingerprint
from hvdtrain.data.shard import Sharded
from hvdtrain.gradients import divergence
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.gradients.verification import Policy
from hvdtrain.keras.callbacks import checkpoint
from hvdtrain.keras.callbacks.distributed import telling
from hvdtrain.keras.checkpointing.restoring import steps_passed_over
from hvdtrain.keras.membership import engine_of, optimizers_of
from hvdtrain.keras.metrics.states import compiled
from hvdtrain.keras.optimizer.averaging import AverageWeights, common_weights_of
from hvdtrain.keras.optimizer.distributed import is_distributed
from hvdtrain.keras.patches import sharded_data
from hvdtrain.keras.patches.progress import Progress
from hvdtrain.keras.patches.usage_warnings import printing_notes
from hvdtrain.patching import replace_where_defined

_STEPS = (
    "A rank that finishes training first would leave the others waiting. Give every rank the same number of "
    "batches and epochs: model.fit(hvd.shard((x, y), batch_size=...), ...) with the whole data on every rank, or "
    "cut all parts to the same length, or pass steps_per_epoch."
)
_VALIDATION = (
    "Decisions based on the logs would differ between ranks. Give validation_data on every rank or on none: "
    "validation_data=hvd.shard((x, y), batch_size=..., shuffle=False) divides it among them."
)
_METRICS = "The logs of the ranks would differ. Compile the model with the same metrics on every rank."
_ADVICE = {
    "the number of steps an epoch": _STEPS,
    "the number of epochs": _STEPS,
    "validation": _VALIDATION,
    "the list of metrics": _METRICS,
    "the number of cache files": "Call dataset.cache(path) on every rank or on none.",
}

_checks_data = True
_checks_validation = True


@functools.cache
def install() -> None:
    """Replace `Model.fit`, and the functions of `sharded_data.py`. A second call has no effect."""
    sharded_data.install()
    replace_where_defined(keras.Model, "fit", _distributed)


def let_data_be_equal() -> None:
    """Do not warn if all ranks train on the same data, as with `--wrap`."""
    global _checks_data
    _checks_data = False


def let_each_validate() -> None:
    """Allow ranks to have different validation data, or none, as scripts written for Horovod may."""
    global _checks_validation
    _checks_validation = False


def _distributed(fit: Callable[..., Any]) -> Callable[..., Any]:
    """Return the one replacement of `fit`: print notes, then compare the ranks, then count samples."""
    run = fit
    for make in (sharded_data.counting_samples, _comparing_ranks, printing_notes):
        run = functools.wraps(fit)(make(run))  # the next one reads the signature
    return run


def _comparing_ranks(fit: Callable[..., Any]) -> Callable[..., Any]:
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
        callback = _Comparison(engine, fingerprint, given)
        given["callbacks"] = preceded(self, given.get("callbacks"), callback)
        given["callbacks"] = preceded(
            self, given["callbacks"], AverageWeights(common_weights_of(optimizers_of(self)))
        )
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


class _Comparison(keras.callbacks.Callback):
    """A callback that compares the ranks before training, and when an epoch or training ends.

    Its methods raise `MismatchError` on every rank if the ranks differ.

    Args:
        engine: The ranks.
        fingerprint: Records the first batches that this rank trains on; None if these are not compared.
        given: The arguments of `fit`.
    """

    def __init__(self, engine: Engine, fingerprint: Fingerprint | None, given: Mapping[str, Any]) -> None:
        super().__init__()
        self._engine = engine
        self._fingerprint = fingerprint
        self._validates = given.get("validation_data") is not None or bool(given.get("validation_split"))
        self._first = given.get("initial_epoch", 0)
        self._asked = given.get("steps_per_epoch")
        self._caches: list[Any] = []
        for data in (given.get("x"), given.get("validation_data")):
            if not isinstance(data, Sharded):
                self._caches += dataset_graph.cache_files(data)
        self._epoch = self._steps = 0
        self._train: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        optimizers = [
            getattr(optimizer, "inner_optimizer", optimizer) for optimizer in optimizers_of(self.model)
        ]
        names = [optimizer._hvdtrain_reducer.choose_name() for optimizer in optimizers]
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
            dataset_graph.refuse_common_caches(self._engine, "model.fit", self._caches)
        self._train = self.model.train_function
        self.model.train_function = self._step

    def leave(self, model: Any) -> None:
        """Restore the training function that the model had before `fit`, also after an error."""
        if self._train is not None:
            model.train_function, self._train = self._train, None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._steps = epoch, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._steps = batch + 1
        if self._steps >= BATCHES:
            self._compare_data()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._agree_on_end(sorted({_base(name) for name in logs or {}}) if _checks_validation else [])
        self._compare_data()
        if epoch == self._first and self.params.get("epochs", 0) > epoch + 1:
            divergence.compare(self._engine, _trainable(self.model), f"after epoch {epoch + 1}")

    def on_train_end(self, logs: Any = None) -> None:
        self._engine.agree(Call("end of training"))
        # A script written for Horovod may make a single step to build its variables, and then broadcast them.
        if self._epoch > self._first or self._steps > Policy.from_environment().first:
            divergence.compare(self._engine, _trainable(self.model), "at the end of model.fit")
        # Not compared again when the script ends: one rank may load other weights to evaluate.
        registry.forget(_trainable(self.model))

    def _step(self, iterator: Any) -> Any:
        """Run the model's training function, and tell the other ranks if the data of this rank ends early."""
        try:
            return self._train(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            self._agree_on_end([])
            raise

    def _agree_on_end(self, details: list[str]) -> None:
        where = (
            f"end of epoch {self._epoch + 1} after {self._steps} steps (give every rank the same number of "
            f"batches, with hvd.shard or steps_per_epoch={self._steps})"
        )
        self._engine.agree(Call(where, tuple(details)))

    def _compare_data(self) -> None:
        fingerprint, self._fingerprint = self._fingerprint, None
        warning = fingerprint.verdict(self._engine) if fingerprint is not None else None
        if warning:
            self._engine.warn(warning)


def _engine(model: Any) -> Engine:
    """Return the ranks that train a model together; only this rank if its optimizer is not distributed."""
    if any(is_distributed(attribute) for attribute in vars(model).values()):
        return engine_of(model)
    return SingleEngine()


def _trainable(model: Any) -> list[Any]:
    """List the trainable variables of a model, including those of frozen layers, which may be unfrozen later."""
    found = [variable for layer in model._flatten_layers() for variable in layer._trainable_variables]
    return list({id(variable): variable for variable in found}.values())


def _compiled_metrics(model: Any) -> str:
    """Return the names of the metrics a model was compiled with, in an order that is the same on all ranks."""
    return ", ".join(sorted(_base(_name(metric)) for metric in compiled(model))) or "none"


def _name(metric: Any) -> str:
    name = getattr(metric, "name", None) or getattr(metric, "__name__", None)
    return metric if isinstance(metric, str) else name or type(metric).__name__


def _base(name: str) -> str:
    """Return a metric's full name without the number that Keras adds to the second metric of a kind in a process.

    The name must be full because a loaded model has "mean_absolute_error" where `compile` was given "mae".
    """
    validation, short = re.fullmatch(r"(val_)?(.*?)(?:_\d+)?", name, re.DOTALL).groups("")  # type: ignore[union-attr]
    try:
        found = keras.metrics.get("accuracy" if short == "acc" else short)
    except ValueError:
        return validation + short
    return validation + (getattr(found, "__name__", None) or type(found).__name__)
