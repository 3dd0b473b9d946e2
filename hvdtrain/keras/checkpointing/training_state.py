"""Capture and restore the state of a training: variables, random numbers and callbacks of all ranks."""

import contextlib
import io
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import tensorflow as tf
from keras.src.saving import saving_lib

from hvdtrain.checkpoints import plain
from hvdtrain.checkpoints.folder import Files
from hvdtrain.collectives.engine import Engine
from hvdtrain.data.collective_errors import together
from hvdtrain.gradients.naming import described_call
from hvdtrain.keras.callbacks.initial_state import folded, states_of
from hvdtrain.keras.checkpointing.callback_states import CallbackStates
from hvdtrain.keras.checkpointing.checkpoint_files import (
    SCHEME,
    VARIABLE,
    Place,
    Saved,
    files_of,
    gathered,
    is_error,
)
from hvdtrain.keras.collectives import broadcast_variables
from hvdtrain.keras.membership import optimizers_of, process_set_of
from hvdtrain.keras.optimizer.averaging import common_weights_of
from hvdtrain.keras.optimizer.distributed import reducers_of, scheme_states

_WEIGHTS_FILE = "model.weights.h5"
_IN_FILE = ("weights", "optimizer")  # sections in the weights file of Keras
_COMPARED = {
    "weights": "weights",
    "optimizer": "variables in its optimizer",
    "generators": "random generators",
    "averages": "variables of LocalSGD or DiLoCo",
}
_PYTHON, _NUMPY, _TENSORFLOW = "random/python", "random/numpy", "random/tensorflow"


class TrainingState:
    """The state of a training, to be captured and restored.

    Values that are equal on all ranks are saved once; for each rank its values that differ from the first rank are
    saved: BatchNormalization statistics, random states, the metrics of its samples. The model may be unbuilt.
    """

    def __init__(self, model: keras.Model, engine: Engine, callbacks: Sequence[Any]) -> None:
        self.callbacks = CallbackStates(callbacks)
        self._model, self._engine = model, engine
        self._in_file: set[str] | None = None

    @property
    def built(self) -> bool:
        """Whether the model's variables exist."""
        layers = [layer for layer in self._model._flatten_layers() if layer is not self._model]
        return all(layer.built for layer in layers or [self._model])

    def capture(self, place: Place, more: Mapping[str, Any]) -> Callable[[], Files] | None:
        """Copy the state; all ranks call this.

        Returns:
            On the first rank, a function that makes the files of a checkpoint, with the facts `more` in
            `state.json`; it may be called in a thread. None on other ranks.
        """
        root = self._engine.ranks[0]
        first = self._engine.rank == root
        sections = self._sections()
        variables = _named(sections)
        others = _random_numbers() | self.callbacks.capture() | self._of_schemes()
        digests = {name: plain.digest(_value(variable)) for name, variable in variables.items()}
        digests |= {name: plain.digest(value) for name, value in others.items()}
        common = self._engine.broadcast_object(digests, root)
        content = together(self._engine, "Checkpoint", lambda: _weights_file(self._model) if first else None)
        if content is None:
            kept = {name for name, mine in digests.items() if common.get(name) != mine}
        else:
            kept = digests.keys() - self._names_in_file(content, digests)
        kept |= {name for name in others if is_error(name)}
        own = {name: _value(variable) for name, variable in variables.items() if name in kept}
        own |= {name: value for name, value in others.items() if name in kept}
        parts = gathered(plain.packed(own), self._engine)
        if content is None:
            return None
        facts = {
            **more,
            **self._facts(sections),
            "digests": {name: digests[name].hex() for name in variables},
        }
        return lambda: {_WEIGHTS_FILE: content, **files_of(place, facts, parts)}

    def restore(self, saved: Saved) -> None:
        """Restore the state; all ranks call this. If the model is not built yet, its variables are not restored.

        Raises:
            ValueError: On every rank, if the checkpoint belongs to another model.
            RuntimeError: On every rank, if a variable is not restored exactly.
        """
        newcomer = self._engine.rank if self._engine.rank >= saved.facts["ranks"] else None
        if self.built:
            self._restore_variables(saved, newcomer)
        _restore_random_numbers(saved.values, newcomer)
        self._restore_schemes(saved)
        missing = self.callbacks.restore(saved.values)
        if missing:
            self._engine.say(
                f"the checkpoint contains the state of {', '.join(missing)}, which this fit does not have."
            )

    def _restore_schemes(self, saved: Saved) -> None:
        """Restore what schemes remember, if the gradients are still reduced in the same way."""
        schemes = saved.facts.get("schemes", [])
        for number, reducer in enumerate(reducers_of(optimizers_of(self._model))):
            prefix = f"{SCHEME}{number}/"
            named = {
                name.removeprefix(prefix): value
                for name, value in saved.values.items()
                if name.startswith(prefix)
            }
            before = schemes[number] if number < len(schemes) else None
            if named and (self._engine.size == 1 or before != reducer.facts):
                self._engine.say(
                    f"{saved.entry} contains what {before['scheme'] if before else 'compression'} had not applied "
                    "yet. It is left out, because gradients are now reduced in another way."
                )
                named = {}
            reducer.scheme_state.replace(named)

    def _of_schemes(self) -> dict[str, np.ndarray]:
        """Return what the optimizers' schemes remember, such as the errors of compression."""
        return {
            f"{SCHEME}{number}/{name}": array
            for number, state in enumerate(scheme_states(optimizers_of(self._model)))
            for name, array in state.named().items()
        }

    def _names_in_file(self, content: bytes, digests: dict[str, bytes]) -> set[str]:
        """Return the variables in Keras' file, which has neither metrics nor what a layer does not save."""
        if self._in_file is None:
            inside = _digests_in(content)
            prefixes = tuple(f"{VARIABLE}{section}/" for section in _IN_FILE)
            self._in_file = {
                name for name, mine in digests.items() if mine in inside and name.startswith(prefixes)
            }
        return self._in_file

    def _restore_variables(self, saved: Saved, newcomer: int | None) -> None:
        for optimizer, trained in zip(optimizers_of(self._model), saved.facts["trained"], strict=False):
            if trained and not optimizer.built and max(trained) < len(self._model.weights):
                optimizer.build([self._model.weights[index] for index in trained])
        sections = self._sections()
        self._check_model(saved, sections)
        if not saved.place.step or saved.facts["sections"].get("metrics") != len(sections["metrics"]):
            # Metrics start from zero in a new epoch, or the first step has not created them yet.
            del sections["metrics"]
        variables = _named(sections)
        root = self._engine.ranks[0]
        first = self._engine.rank == root
        together(self._engine, "Checkpoint", lambda: self._load(saved, variables) if first else None)
        broadcast_variables(list(variables.values()), root, process_set_of(self._model))
        _assign(variables, saved.values)
        if newcomer is not None:
            for generator in states_of(self._model):
                generator.assign(folded(generator.numpy(), newcomer))

    def _load(self, saved: Saved, variables: dict[str, Any]) -> None:
        _load_weights(self._model, saved.entry / _WEIGHTS_FILE)
        _assign(variables, saved.values)
        for name, variable in variables.items():
            if plain.digest(_value(variable)).hex() != saved.facts["digests"][name]:
                raise RuntimeError(
                    f"{saved.entry}: {getattr(variable, 'path', name)} was not restored as it was saved, though "
                    "the files are complete. A layer's load_own_variables must restore everything that its "
                    "save_own_variables writes."
                )

    def _check_model(self, saved: Saved, sections: Mapping[str, Sequence[Any]]) -> None:
        """Raise ValueError with the first difference, unless the checkpoint belongs to this model."""
        ours, theirs = self._facts(sections), saved.facts
        lines = zip(ours["compared"], theirs["compared"], ours["shown"], theirs["shown"], strict=False)
        for mine, other, shown, other_shown in lines:
            if mine != other:
                raise ValueError(_of_another(saved, other_shown, shown))
        for section, name in _COMPARED.items():
            count, other_count = len(sections[section]), theirs["sections"].get(section, 0)
            if count != other_count:
                raise ValueError(_of_another(saved, f"{other_count} {name}", f"{count} {name}"))

    def _facts(self, sections: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        calls = []
        for section in _IN_FILE:
            details = [f"{variable.dtype} {tuple(variable.shape)}" for variable in sections[section]]
            calls.append(described_call(section, sections[section], details, section == "weights"))
        optimizers = optimizers_of(self._model)
        return {
            "keras": keras.version(),
            "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
            "compared": [line for call in calls for line in call.details],
            "shown": [line for call in calls for line in call.shown],
            "trained": [self._trained_by(optimizer) for optimizer in optimizers],
            "rates": [float(optimizer.learning_rate) for optimizer in adjustable(self._model)],
            "schemes": [reducer.facts for reducer in reducers_of(optimizers)],
            "sections": {section: len(found) for section, found in sections.items() if found},
        }

    def _trained_by(self, optimizer: Any) -> list[int]:
        """List the indices of the weights that an optimizer trains; in a GAN no optimizer trains all."""
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        numbers = {id(variable): index for index, variable in enumerate(self._model.weights)}
        trained = inner._trainable_variables if optimizer.built else []
        return [numbers[id(variable)] for variable in trained if id(variable) in numbers]

    def _sections(self) -> dict[str, list[Any]]:
        """Return all variables, each once, in an order that is the same in every run."""
        sections = {
            "weights": self._model.weights,
            "optimizer": [var for optimizer in optimizers_of(self._model) for var in optimizer.variables],
            "generators": states_of(self._model),
            "metrics": [var for metric in self._model.metrics for var in metric.variables],
            "averages": [
                var for average in common_weights_of(optimizers_of(self._model)) for var in average.variables
            ],
        }
        seen: set[int] = set()
        found: dict[str, list[Any]] = {section: [] for section in sections}
        for section, variables in sections.items():
            for variable in variables:
                if id(variable) not in seen:
                    seen.add(id(variable))
                    found[section].append(variable)
        return found


def adjustable(model: keras.Model) -> list[Any]:
    """List the optimizers whose learning rate can be set, which excludes those with a schedule."""
    inner = [getattr(optimizer, "inner_optimizer", optimizer) for optimizer in optimizers_of(model)]
    return [optimizer for optimizer in inner if isinstance(optimizer._learning_rate, keras.Variable)]


def _named(sections: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {
        f"{VARIABLE}{section}/{index}": variable
        for section, variables in sections.items()
        for index, variable in enumerate(variables)
    }


def _assign(variables: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    for name in variables.keys() & values.keys():
        variables[name].assign(values[name])


def _value(variable: Any) -> np.ndarray:
    return np.array(variable.numpy())


def _of_another(saved: Saved, theirs: str, ours: str) -> str:
    return (
        f"The checkpoint {saved.entry} is of another model: where it has {theirs}, this one has {ours}. Give this "
        "training its own directory, or remove that one."
    )


def _weights_file(model: keras.Model) -> bytes:
    """Return the file content of `model.save_weights`: weights and the optimizer's state."""
    buffer = io.BytesIO()
    store = saving_lib.H5IOStore(buffer, mode="w")
    saving_lib._save_state(model, store, None, inner_path="", visited_saveables=set())
    store.h5_file.close()  # store.close() would close the buffer too
    return buffer.getvalue()


def _load_weights(model: keras.Model, path: Path) -> None:
    """Load weights as `model.load_weights` does, also for a model that is not built but whose layers are."""
    store = saving_lib.H5IOStore(str(path), mode="r")
    with contextlib.closing(store):
        saving_lib._load_state(model, store, None, inner_path="", visited_saveables=set())


def _digests_in(content: bytes) -> set[bytes]:
    """Return the digests of all arrays in the content of a weights file."""
    found: set[bytes] = set()

    def take(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "biufc":
            found.add(plain.digest(np.asarray(item[()])))

    with h5py.File(io.BytesIO(content), "r") as file:
        file.visititems(take)
    return found


def _random_numbers() -> dict[str, Any]:
    """Return the states of the global random generators of Python, NumPy and TensorFlow as plain values."""
    found: dict[str, Any] = {_PYTHON: random.getstate(), _NUMPY: np.random.get_state()}
    with contextlib.suppress(RuntimeError):  # with enable_op_determinism there may be no generator
        found[_TENSORFLOW] = tf.random.get_global_generator().state.numpy()
    return found


def _restore_random_numbers(states: Mapping[str, Any], newcomer: int | None) -> None:
    """Set the global generators; a rank that did not exist when they were captured gets a different state."""
    if _PYTHON in states:
        random.setstate(states[_PYTHON])
    if _NUMPY in states:
        np.random.set_state(states[_NUMPY])
    if _TENSORFLOW in states:
        tf.random.get_global_generator().state.assign(states[_TENSORFLOW])
    if newcomer is not None:
        drawn = np.random.SeedSequence((random.getrandbits(64), newcomer)).generate_state(2)
        random.seed(int(drawn[0]))
        np.random.seed(int(drawn[1]))
