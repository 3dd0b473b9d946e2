"""Define states of variables: shared ones, and those that belong to each rank alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.gradients.naming import variable_name
from hvdtrain.keras.collectives import broadcast_variables
from hvdtrain.keras.elastic.state import ObjectState
from hvdtrain.keras.elastic.store import Snapshot


@dataclass(frozen=True)
class Progress:
    """The number of trained batches of an epoch, which unlike `batch` does not depend on the order of callbacks.

    Args:
        epoch: The attribute `epoch` of the state during the epoch.
        batches: Number of batches that were trained.
    """

    epoch: Any
    batches: int


class VariablesState(ObjectState):
    """A state of attributes, variables that are equal on all ranks, and variables of each rank."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            lambda value: runtime.engine().broadcast_object(value), lambda: runtime.engine().rank, **kwargs
        )
        self.progress: Progress | None = None
        self.replaying = False
        self._saved_progress: Progress | None = None
        self._saved_metrics: list[np.ndarray] = []
        self._copy_variables()

    def save(self) -> None:
        """Copy variables and attributes."""
        super().save()
        self._copy_variables()
        self._saved_metrics = [_copied(variable) for variable in self._metrics()]

    def restore(self) -> None:
        """Set variables and attributes to the last saved values."""
        super().restore()
        self.progress = self._saved_progress
        for variable, value in self._saved:
            variable.assign(value)

    def sync(self) -> None:
        """Set variables and attributes of all ranks to those of rank 0, and save them."""
        broadcast_variables(self._shared(), 0)
        super().sync()
        self.progress = self._bcast_object(self.progress)
        self._copy_variables()

    def _shared(self) -> list[Any]:
        raise NotImplementedError

    def _own(self) -> list[Any]:
        return []

    def _metrics(self) -> list[Any]:
        return []

    def _copy_variables(self) -> None:
        self._saved = [(variable, _copied(variable)) for variable in (*self._shared(), *self._own())]
        self._saved_progress = self.progress

    def resume_metrics(self) -> None:
        """Restore the metrics of a partly trained epoch, which `fit` has just reset."""
        metrics = self._metrics()
        if [tuple(variable.shape) for variable in metrics] == [
            variable.shape for variable in self._saved_metrics
        ]:
            for variable, value in zip(metrics, self._saved_metrics, strict=True):
                variable.assign(value)

    def _snapshot(self) -> Snapshot:
        count = len(self._shared())
        own = [value for _, value in self._saved[count:]], self._saved_metrics, self._saved_progress
        return Snapshot(
            self._saved_state,
            _described([variable for variable, _ in self._saved[:count]]),
            [value for _, value in self._saved[:count]],
            runtime.engine().gather_object(own, 0) or [],
        )

    def _difference(self, snapshot: Snapshot) -> str | None:
        ours, theirs = _described(self._shared()), snapshot.described
        if ours == theirs:
            return super()._difference(snapshot)
        if len(ours) != len(theirs):
            return f"it has {len(theirs)} variables, the state has {len(ours)}"
        mine, other = next(pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1])
        return f"where it has {other}, the state has {mine}"

    def _adopt(self, snapshot: Snapshot) -> None:
        super()._adopt(snapshot)
        for variable, value in zip(self._shared(), snapshot.arrays, strict=True):
            variable.assign(value)

    def _adopt_own(self, own: Any) -> None:
        values, self._saved_metrics, self.progress = own
        for variable, value in zip(self._own(), values, strict=True):
            variable.assign(value)


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

    def _shared(self) -> list[Any]:
        return self.variables


def _copied(variable: Any) -> np.ndarray:
    return np.array(variable.numpy())


def _described(variables: Sequence[Any]) -> tuple[str, ...]:
    """Return a line for each variable; without Keras' numbers, which depend on the layers built before."""
    names = [re.sub(r"_[0-9]+(?=[/_]|$)", "", variable_name(variable)) for variable in variables]
    return tuple(
        f"{name}, {variable.dtype}, shape {tuple(variable.shape)}"
        for name, variable in zip(names, variables, strict=True)
    )


def distinct(variables: Sequence[Any]) -> list[Any]:
    """List each variable once, in order."""
    return list({id(variable): variable for variable in variables}.values())
