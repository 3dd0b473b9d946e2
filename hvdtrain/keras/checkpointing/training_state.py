"""Capture and restore the state of a training: variables, random numbers and callbacks of all ranks."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from hvdtrain.checkpoints import plain
from hvdtrain.collectives.engine import Engine
from hvdtrain.data.collective_errors import together
from hvdtrain.gradients.naming import described_call
from hvdtrain.keras.callbacks.initial_state import folded, states_of
from hvdtrain.keras.callbacks.membership import optimizers_of, process_set_of
from hvdtrain.keras.checkpointing import model_file, random_numbers
from hvdtrain.keras.checkpointing.callback_states import CallbackStates
from hvdtrain.keras.checkpointing.saved_state import VARIABLE, Files, Place, Saved, files_of, gathered
from hvdtrain.keras.collectives import broadcast_variables

_CALLBACK = "callback/"
_METRICS = "metrics"
_IN_FILE = ("weights", "optimizer")  # sections in the weights file of Keras


class TrainingState:
    """The state of a training, to be captured and restored.

    Values that are equal on all ranks are saved once; for each rank its values that differ from the first rank are
    saved: BatchNormalization statistics, random states, the metrics of its samples.

    Args:
        model: The model, which need not be built yet.
        engine: The ranks that train it.
        callbacks: The callbacks whose state is saved.
    """

    def __init__(self, model: keras.Model, engine: Engine, callbacks: Sequence[Any]) -> None:
        self.callbacks = CallbackStates(callbacks)
        self._model, self._engine = model, engine
        self._not_saved_by_keras: set[str] | None = None

    @property
    def built(self) -> bool:
        """Whether the model's variables exist."""
        layers = [layer for layer in self._model._flatten_layers() if layer is not self._model]
        return all(layer.built for layer in layers or [self._model])

    def capture(self, place: Place, more: Mapping[str, Any]) -> Callable[[], Files] | None:
        """Copy the state; all ranks call this.

        Args:
            place: The position of the training.
            more: Further facts for `state.json`.

        Returns:
            On the first rank, a function that makes the files of a checkpoint, also in a thread; None on others.
        """
        variables, others = self._variables(), self._others()
        digests = {name: plain.digest(_value(variable)) for name, variable in variables.items()}
        digests |= {name: plain.digest(value) for name, value in others.items()}
        common = self._engine.broadcast_object(digests, self._engine.ranks[0])
        content = together(self._engine, "Checkpoint", self._weights_file)
        if content is None:
            kept = {name for name, mine in digests.items() if common.get(name) != mine}
        else:
            kept = self._not_in_file(content, digests) | set(others)
        own = {name: _value(variable) for name, variable in variables.items() if name in kept}
        own |= {name: value for name, value in others.items() if name in kept}
        parts = gathered(plain.packed(own), self._engine)
        if content is None:
            return None
        facts = {
            **more,
            **self._facts(variables),
            "digests": {name: digests[name].hex() for name in variables},
        }
        return lambda: {model_file.NAME: content, **files_of(place, facts, parts)}

    def restore(self, saved: Saved) -> None:
        """Restore the state; all ranks call this. If the model is not built yet, its variables are not restored.

        Raises:
            ValueError: On every rank, if the checkpoint belongs to another model.
            RuntimeError: On every rank, if a variable is not restored exactly.
        """
        newcomer = self._engine.rank if self._engine.rank >= saved.facts["ranks"] else None
        if self.built:
            self._restore_variables(saved, newcomer)
        random_numbers.restore(saved.values, newcomer)
        missing = self.callbacks.restore(saved.under(_CALLBACK))
        if missing:
            self._engine.say(
                f"the checkpoint contains the state of {', '.join(missing)}, which this fit does not have."
            )

    def _weights_file(self) -> bytes | None:
        return model_file.weights_file(self._model) if self._engine.rank == self._engine.ranks[0] else None

    def _not_in_file(self, content: bytes, digests: dict[str, bytes]) -> set[str]:
        """Return the variables that are not in Keras' file: metrics, and those that a layer does not save."""
        if self._not_saved_by_keras is None:
            inside = model_file.digests_in(content)
            self._not_saved_by_keras = {name for name, mine in digests.items() if mine not in inside}
        return self._not_saved_by_keras | {name for name in digests if _section(name) not in _IN_FILE}

    def _restore_variables(self, saved: Saved, newcomer: int | None) -> None:
        for optimizer, trained in zip(optimizers_of(self._model), saved.facts["trained"], strict=False):
            if trained and not optimizer.built and max(trained) < len(self._model.weights):
                optimizer.build([self._model.weights[index] for index in trained])
        variables = self._variables()
        self._check_model(saved, variables)
        if not saved.place.step or saved.facts["sections"].get(_METRICS) != _count(variables, _METRICS):
            # Metrics start from zero in a new epoch, or the first step has not created them yet.
            variables = {name: var for name, var in variables.items() if _section(name) != _METRICS}
        root = self._engine.ranks[0]
        first = self._engine.rank == root
        together(self._engine, "Checkpoint", lambda: self._load(saved, variables) if first else None)
        broadcast_variables(list(variables.values()), root, process_set_of(self._model))
        for name in variables.keys() & saved.own.keys():
            variables[name].assign(saved.own[name])
        if newcomer is not None:
            for generator in states_of(self._model):
                generator.assign(folded(generator.numpy(), newcomer))

    def _load(self, saved: Saved, variables: dict[str, Any]) -> None:
        model_file.load(self._model, saved.entry / model_file.NAME)
        for name in variables.keys() & saved.common.keys():
            variables[name].assign(saved.common[name])
        for name, variable in variables.items():
            if plain.digest(_value(variable)).hex() != saved.facts["digests"][name]:
                raise RuntimeError(
                    f"{saved.entry}: {getattr(variable, 'path', name)} was not restored as it was saved, though "
                    "the files are complete. A layer's load_own_variables must restore everything that its "
                    "save_own_variables writes."
                )

    def _check_model(self, saved: Saved, variables: dict[str, Any]) -> None:
        """Raise ValueError with the first difference, unless the checkpoint belongs to this model."""
        ours, theirs = self._facts(variables), saved.facts
        for mine, other in zip(ours["compared"], theirs["compared"], strict=False):
            if mine != other:
                index = ours["compared"].index(mine)
                raise ValueError(
                    _of_another(saved, f"it has {theirs['shown'][index]}", f"{ours['shown'][index]}")
                )
        for section in ("weights", "optimizer", "generators"):
            mine, other = ours["sections"].get(section, 0), theirs["sections"].get(section, 0)
            if mine != other:
                raise ValueError(_of_another(saved, f"it has {_many(other, section)}", _many(mine, section)))

    def _facts(self, variables: dict[str, Any]) -> dict[str, Any]:
        listed = {section: _of(variables, section) for section in _IN_FILE}
        calls = [
            described_call(
                section,
                found,
                [f"{optimizer.dtype} {tuple(optimizer.shape)}" for optimizer in found],
                section == "weights",
            )
            for section, found in listed.items()
        ]
        return {
            "keras": keras.version(),
            "optimizers": [type(optimizer).__name__ for optimizer in optimizers_of(self._model)],
            "compared": [line for call in calls for line in call.details],
            "shown": [line for call in calls for line in call.shown],
            "trained": [self._trained_by(optimizer) for optimizer in optimizers_of(self._model)],
            "rates": [float(optimizer.learning_rate) for optimizer in adjustable(self._model)],
            "sections": dict(collections.Counter(_section(name) for name in variables)),
        }

    def _trained_by(self, optimizer: Any) -> list[int]:
        """List the indices of the weights that an optimizer trains; in a GAN no optimizer trains all."""
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        numbers = {id(variable): index for index, variable in enumerate(self._model.weights)}
        trained = inner._trainable_variables if optimizer.built else []
        return [numbers[id(variable)] for variable in trained if id(variable) in numbers]

    def _variables(self) -> dict[str, Any]:
        """Return all variables, each once, by names that are the same in every run."""
        sections = {
            "weights": self._model.weights,
            "optimizer": [var for optimizer in optimizers_of(self._model) for var in optimizer.variables],
            "generators": states_of(self._model),
            _METRICS: [var for metric in self._model.metrics for var in metric.variables],
        }
        seen: set[int] = set()
        found: dict[str, Any] = {}
        for section, variables in sections.items():
            index = 0
            for variable in variables:
                if id(variable) not in seen:
                    seen.add(id(variable))
                    found[f"{VARIABLE}{section}/{index}"] = variable
                    index += 1
        return found

    def _others(self) -> dict[str, Any]:
        learned = {f"{_CALLBACK}{name}": value for name, value in self.callbacks.capture().items()}
        return {**random_numbers.capture(), **learned}


def adjustable(model: keras.Model) -> list[Any]:
    """List the optimizers whose learning rate can be set, which excludes those with a schedule."""
    inner = [getattr(optimizer, "inner_optimizer", optimizer) for optimizer in optimizers_of(model)]
    return [optimizer for optimizer in inner if isinstance(optimizer._learning_rate, keras.Variable)]


def _of_another(saved: Saved, theirs: str, ours: str) -> str:
    return (
        f"The checkpoint {saved.entry} is of another model: where {theirs}, this one has {ours}. Give this "
        "training its own directory, or remove that one."
    )


def _many(count: int, section: str) -> str:
    named = {
        "weights": "weights",
        "optimizer": "variables in its optimizer",
        "generators": "random generators",
    }
    return f"{count} {named[section]}"


def _of(variables: dict[str, Any], section: str) -> list[Any]:
    return [variable for name, variable in variables.items() if _section(name) == section]


def _count(variables: dict[str, Any], section: str) -> int:
    return len(_of(variables, section))


def _section(name: str) -> str:
    return name.split("/")[1]


def _value(variable: Any) -> np.ndarray:
    return np.array(variable.numpy())
