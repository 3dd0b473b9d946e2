"""All that decides how a training goes on: variables, random numbers, callbacks; of all ranks, and of each."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from hvdtrain.checkpoints import plain
from hvdtrain.collectives.engine import Engine
from hvdtrain.data.collective_errors import together
from hvdtrain.gradients.naming import described_call
from hvdtrain.keras.broadcast_variables import broadcast_variables
from hvdtrain.keras.callbacks.membership import optimizers_of, process_set_of
from hvdtrain.keras.callbacks.random_states import folded, states_of
from hvdtrain.keras.checkpointing import model_file, random_numbers
from hvdtrain.keras.checkpointing.callback_states import CallbackStates
from hvdtrain.keras.checkpointing.saved_state import VARIABLE, Files, Place, Saved, files_of, gathered

_CALLBACK = "callback/"
_METRICS = "metrics"
_IN_FILE = ("weights", "optimizer")  # what Keras' own file is for


class TrainingState:
    """Takes a training's state apart and puts it together.

    What all ranks hold alike is kept once, and of each rank what differs from the first: its BatchNormalization
    statistics, its random numbers, the metrics of its samples.

    Args:
        model: The model, which need not be built yet.
        engine: The ranks that train it.
        callbacks: The callbacks whose state counts.
    """

    def __init__(self, model: keras.Model, engine: Engine, callbacks: Sequence[Any]) -> None:
        self.callbacks = CallbackStates(callbacks)
        self._model, self._engine = model, engine
        self._beside: set[str] | None = None

    @property
    def built(self) -> bool:
        """Whether the model's variables exist."""
        parts = [each for each in self._model._flatten_layers() if each is not self._model]
        return all(each.built for each in parts or [self._model])

    def capture(self, place: Place, more: Mapping[str, Any]) -> Callable[[], Files] | None:
        """Copy the state, on all ranks together.

        Args:
            place: Where the training is.
            more: Further facts for `state.json`.

        Returns:
            On the first rank, what makes the files of a checkpoint, in a thread say; None on the others.
        """
        variables, others = self._variables(), self._others()
        digests = {name: plain.digest(_value(each)) for name, each in variables.items()}
        digests |= {name: plain.digest(value) for name, value in others.items()}
        common = self._engine.broadcast_object(digests, self._engine.ranks[0])
        content = together(self._engine, "Checkpoint", self._weights_file)
        if content is None:
            kept = {name for name, mine in digests.items() if common.get(name) != mine}
        else:
            kept = self._not_in_file(content, digests) | set(others)
        own = {name: _value(each) for name, each in variables.items() if name in kept}
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
        """Set all of it, on all ranks together; of a model that is not built yet, what there is.

        Raises:
            ValueError: On every rank, if the checkpoint is of another model.
            RuntimeError: On every rank, if a variable does not come back as it was.
        """
        newcomer = self._engine.rank if self._engine.rank >= saved.facts["ranks"] else None
        if self.built:
            self._restore_variables(saved, newcomer)
        random_numbers.restore(saved.values, newcomer)
        lost = self.callbacks.restore(saved.under(_CALLBACK))
        if lost:
            self._engine.say(
                f"the checkpoint holds the state of {', '.join(lost)}, which this fit has no more."
            )

    def _weights_file(self) -> bytes | None:
        return model_file.weights_file(self._model) if self._engine.rank == self._engine.ranks[0] else None

    def _not_in_file(self, content: bytes, digests: dict[str, bytes]) -> set[str]:
        """Find out, once, what Keras does not put into its file: metrics, and what a layer withholds."""
        if self._beside is None:
            inside = model_file.digests_in(content)
            self._beside = {name for name, mine in digests.items() if mine not in inside}
        return self._beside | {name for name in digests if _section(name) not in _IN_FILE}

    def _restore_variables(self, saved: Saved, newcomer: int | None) -> None:
        for each, trained in zip(optimizers_of(self._model), saved.facts["trained"], strict=False):
            if trained and not each.built and max(trained) < len(self._model.weights):
                each.build([self._model.weights[index] for index in trained])
        variables = self._variables()
        self._refuse_another(saved, variables)
        if not saved.place.step or saved.facts["sections"].get(_METRICS) != _count(variables, _METRICS):
            # An epoch begins with none, or the first step has yet to make them.
            variables = {name: each for name, each in variables.items() if _section(name) != _METRICS}
        root = self._engine.ranks[0]
        first = self._engine.rank == root
        together(self._engine, "Checkpoint", lambda: self._load(saved, variables) if first else None)
        broadcast_variables(list(variables.values()), root, process_set_of(self._model))
        for name in variables.keys() & saved.own.keys():
            variables[name].assign(saved.own[name])
        if newcomer is not None:
            for each in states_of(self._model):
                each.assign(folded(each.numpy(), newcomer))

    def _load(self, saved: Saved, variables: dict[str, Any]) -> None:
        model_file.load(self._model, saved.entry / model_file.NAME)
        for name in variables.keys() & saved.common.keys():
            variables[name].assign(saved.common[name])
        for name, each in variables.items():
            if plain.digest(_value(each)).hex() != saved.facts["digests"][name]:
                raise RuntimeError(
                    f"{saved.entry}: {getattr(each, 'path', name)} did not come back as it was saved, though the "
                    "files are whole. A layer's load_own_variables must be the reverse of its save_own_variables."
                )

    def _refuse_another(self, saved: Saved, variables: dict[str, Any]) -> None:
        """Raise ValueError, with the first difference, unless the checkpoint is of this model."""
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
                section, found, [f"{each.dtype} {tuple(each.shape)}" for each in found], section == "weights"
            )
            for section, found in listed.items()
        ]
        return {
            "keras": keras.version(),
            "optimizers": [type(each).__name__ for each in optimizers_of(self._model)],
            "compared": [line for call in calls for line in call.details],
            "shown": [line for call in calls for line in call.shown],
            "trained": [self._trained_by(each) for each in optimizers_of(self._model)],
            "rates": [float(each.learning_rate) for each in adjustable(self._model)],
            "sections": dict(collections.Counter(_section(name) for name in variables)),
        }

    def _trained_by(self, optimizer: Any) -> list[int]:
        """List the weights that an optimizer trains; of a model like a GAN none trains all."""
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        numbers = {id(each): index for index, each in enumerate(self._model.weights)}
        trained = inner._trainable_variables if optimizer.built else []
        return [numbers[id(each)] for each in trained if id(each) in numbers]

    def _variables(self) -> dict[str, Any]:
        """List all variables, each once."""
        sections = {
            "weights": self._model.weights,
            "optimizer": [each for one in optimizers_of(self._model) for each in one.variables],
            "generators": states_of(self._model),
            _METRICS: [each for metric in self._model.metrics for each in metric.variables],
        }
        seen: set[int] = set()
        found: dict[str, Any] = {}
        for section, variables in sections.items():
            fresh = [each for each in variables if not (id(each) in seen or seen.add(id(each)))]  # type: ignore[func-returns-value]
            found |= {f"{VARIABLE}{section}/{index}": each for index, each in enumerate(fresh)}
        return found

    def _others(self) -> dict[str, Any]:
        learned = {f"{_CALLBACK}{name}": value for name, value in self.callbacks.capture().items()}
        return {**random_numbers.capture(), **learned}


def adjustable(model: keras.Model) -> list[Any]:
    """List the optimizers whose learning rate callbacks may set, which one with a schedule does not let them."""
    inner = [getattr(each, "inner_optimizer", each) for each in optimizers_of(model)]
    return [each for each in inner if isinstance(each._learning_rate, keras.Variable)]


def _of_another(saved: Saved, theirs: str, ours: str) -> str:
    return (
        f"The checkpoint {saved.entry} is of another model: where {theirs}, this one has {ours}. Give this "
        "training a directory of its own, or remove that one."
    )


def _many(count: int, section: str) -> str:
    named = {
        "weights": "weights",
        "optimizer": "variables in its optimizer",
        "generators": "random generators",
    }
    return f"{count} {named[section]}"


def _of(variables: dict[str, Any], section: str) -> list[Any]:
    return [each for name, each in variables.items() if _section(name) == section]


def _count(variables: dict[str, Any], section: str) -> int:
    return len(_of(variables, section))


def _section(name: str) -> str:
    return name.split("/")[1]


def _value(variable: Any) -> np.ndarray:
    return np.array(variable.numpy())
