"""Define elastic states with variables: of a Keras model and its optimizer, or of a list."""

import copy
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.gradients.naming import variable_name
from hvdtrain.gradients.schemes import State
from hvdtrain.keras.collectives import broadcast_object, broadcast_variables
from hvdtrain.keras.elastic.state import ObjectState
from hvdtrain.keras.optimizer.averaging import common_weights_of
from hvdtrain.keras.optimizer.distributed import scheme_states


class Variables(NamedTuple):
    """The variables of a state: equal on all ranks, of this rank alone, and of metrics."""

    shared: list[Any]
    own: list[Any]
    metrics: list[Any]


class VariablesState(ObjectState):
    """A state of attributes, variables that are equal on all ranks, and variables of each rank."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(broadcast_object, lambda: runtime.engine().rank, **kwargs)
        # The epoch in progress and the number of its batches that were trained. Unlike the attribute `batch`, it
        # does not depend on the order of callbacks.
        self.progress: tuple[Any, int] | None = None
        self.replaying = False  # whether batches are skipped that were trained before the commit
        self._saved_metrics: list[np.ndarray] = []
        self._copy_variables()

    def save(self) -> None:
        """Copy variables and attributes."""
        super().save()
        self._copy_variables()
        self._saved_metrics = [value for _, value in _copied(self._variables().metrics)]

    def restore(self) -> None:
        """Set variables and attributes to the last saved values."""
        super().restore()
        self.progress = self._saved_progress
        self._set_schemes(self._saved_schemes)
        for variable, value in (*self._saved_shared, *self._saved_own):
            variable.assign(value)

    def sync(self) -> None:
        """Set variables and attributes of all ranks to those of rank 0, and save them."""
        broadcast_variables(self._variables().shared, 0)
        for state in self._schemes():
            state.shared.update(self._bcast_object(state.shared))
        super().sync()
        self.progress = self._bcast_object(self.progress)
        self._copy_variables()

    def resume_metrics(self) -> None:
        """Restore the metrics of a partly trained epoch, which `fit` has just reset."""
        metrics = self._variables().metrics
        if [tuple(variable.shape) for variable in metrics] == [value.shape for value in self._saved_metrics]:
            _assign(metrics, self._saved_metrics)

    def _variables(self) -> Variables:
        raise NotImplementedError

    def _schemes(self) -> list[State]:
        """Return what the schemes of the optimizers remember."""
        return []

    def _set_schemes(self, saved: Sequence[dict[str, np.ndarray]]) -> None:
        for state, named in zip(self._schemes(), saved, strict=True):
            state.replace(named)

    def _copy_variables(self) -> None:
        variables = self._variables()
        self._saved_shared, self._saved_own = _copied(variables.shared), _copied(variables.own)
        self._saved_schemes = copy.deepcopy([state.named() for state in self._schemes()])
        self._saved_progress = self.progress

    def _described(self) -> tuple[str, ...]:
        shared = self._variables().shared
        # Without Keras' numbers, which depend on the layers built before.
        names = [re.sub(r"_[0-9]+(?=[/_]|$)", "", variable_name(variable)) for variable in shared]
        return tuple(
            f"{name}, {variable.dtype}, shape {tuple(variable.shape)}"
            for name, variable in zip(names, shared, strict=True)
        )

    def _saved_values(self) -> tuple[list[np.ndarray], Any]:
        own = [value for _, value in self._saved_own]
        return [value for _, value in self._saved_shared], (
            own,
            self._saved_metrics,
            self._saved_progress,
            self._saved_schemes,
        )

    def _load(self, values: dict[str, Any], shared: list[np.ndarray]) -> None:
        super()._load(values, shared)
        _assign(self._variables().shared, shared)

    def _load_own(self, own: Any) -> None:
        values, self._saved_metrics, self.progress, *schemes = (
            own  # commits of an earlier version have no schemes
        )
        _assign(self._variables().own, values)
        if schemes:
            self._set_schemes(*schemes)


class TensorFlowState(VariablesState):
    """The state of a list of variables, and of the attributes given by name.

    Args:
        variables: TensorFlow or Keras variables. TensorFlow 2 keeps no list of all variables, so without this
            argument only the attributes are saved.
        session: Must be None, because there are no sessions in TensorFlow 2.
        kwargs: Further attributes, such as `epoch=0, batch=0`.

    Raises:
        ValueError: If a session is given.
    """

    def __init__(self, variables: Sequence[Any] | None = None, session: Any = None, **kwargs: Any) -> None:
        if session is not None:
            raise ValueError(
                "TensorFlowState: there are no sessions in TensorFlow 2. Pass the variables, and leave session out."
            )
        self.variables = list(variables or tf.compat.v1.global_variables())
        self.session = None
        super().__init__(**kwargs)

    def _variables(self) -> Variables:
        return Variables(self.variables, [], [])


class TensorFlowKerasState(VariablesState):
    """State of a Keras model and its optimizer: weights, optimizer state, and the attributes given by name.

    States of random generators and accumulated gradients belong to each rank alone; everything else is shared.

    Args:
        model: A model that is built.
        optimizer: The optimizer that trains it; by default the one it was compiled with.
        backend: Accepted for compatibility with Horovod, which needs it with TensorFlow 1; ignored.
        kwargs: Further attributes, such as `epoch=0, batch=0`.

    Raises:
        ValueError: If the model is not built, or has no optimizer and none is given.
    """

    def __init__(self, model: Any, optimizer: Any = None, backend: Any = None, **kwargs: Any) -> None:
        if not getattr(model, "built", True):
            raise ValueError(
                f"{type(self).__name__}: the model must be built first, so that its weights exist. Give it a "
                "keras.Input, or call model.build(input_shape)."
            )
        self.model = model
        self.optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
        self.backend = backend
        if self.optimizer is None:
            raise ValueError(
                f"{type(self).__name__}: the model has no optimizer. Compile it first, or pass optimizer=."
            )
        if common_weights_of([self.optimizer, getattr(model, "optimizer", None)]):
            raise ValueError(
                f"{type(self).__name__} does not keep what LocalSGD and DiLoCo need to continue. Use "
                "hvd.callbacks.Checkpoint, which does, and `hvdtrain run --max-restarts`."
            )
        super().__init__(**kwargs)

    def _optimizers(self) -> list[Any]:
        """List the optimizer, and that of `compile` if it differs: a loss scale around it, or a copy."""
        optimizers = _distinct([self.optimizer, getattr(self.model, "optimizer", None)], without=[None])
        for optimizer in optimizers:
            if not optimizer.built:
                optimizer.build(self.model.trainable_variables)
        return optimizers

    def _variables(self) -> Variables:
        optimizers = self._optimizers()
        accumulators: list[Any] = []
        for optimizer in optimizers:
            inner = getattr(optimizer, "inner_optimizer", optimizer)
            accumulators += getattr(inner, "_accumulated_gradients", ())
        state = [variable for optimizer in optimizers for variable in optimizer.variables]
        return Variables(
            _distinct([*self.model.weights, *state], without=accumulators),
            _distinct([*self.model.variables, *accumulators], without=self.model.weights),
            [variable for metric in getattr(self.model, "metrics", ()) for variable in metric.variables],
        )

    def _schemes(self) -> list[State]:
        return scheme_states(self._optimizers())


class KerasState(TensorFlowKerasState):
    """The same state; its arguments are those of `TensorFlowKerasState` without `backend`."""

    def __init__(self, model: Any, optimizer: Any = None, **kwargs: Any) -> None:
        super().__init__(model, optimizer, **kwargs)


def _copied(variables: Sequence[Any]) -> list[tuple[Any, np.ndarray]]:
    return [(variable, np.array(variable.numpy())) for variable in variables]


def _assign(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _distinct(variables: Sequence[Any], without: Sequence[Any] = ()) -> list[Any]:
    """Return each variable once, in order, except those in `without`."""
    found = {id(variable): variable for variable in variables}
    for variable in without:
        found.pop(id(variable), None)
    return list(found.values())
