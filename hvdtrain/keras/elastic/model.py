"""Commit and restore the state of a Keras model and its optimizer."""

from typing import Any

from hvdtrain.keras.elastic.variables import VariablesState, distinct


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
        super().__init__(**kwargs)

    def _optimizers(self) -> list[Any]:
        """List the optimizer, and that of `compile` if it differs: a loss scale around it, or a copy."""
        known = [self.optimizer, getattr(self.model, "optimizer", None)]
        optimizers = [optimizer for optimizer in dict.fromkeys(known) if optimizer is not None]
        for optimizer in optimizers:
            if not optimizer.built:
                optimizer.build(self.model.trainable_variables)
        return optimizers

    def _shared(self) -> list[Any]:
        state = [variable for optimizer in self._optimizers() for variable in optimizer.variables]
        own = {id(variable) for variable in self._accumulators()}
        return distinct([*self.model.weights, *(variable for variable in state if id(variable) not in own)])

    def _own(self) -> list[Any]:
        weights = {id(weight) for weight in self.model.weights}
        generators = [variable for variable in self.model.variables if id(variable) not in weights]
        return distinct([*generators, *self._accumulators()])

    def _accumulators(self) -> list[Any]:
        accumulators: list[Any] = []
        for optimizer in self._optimizers():
            inner = getattr(optimizer, "inner_optimizer", optimizer)
            accumulators += getattr(inner, "_accumulated_gradients", ())
        return accumulators

    def _metrics(self) -> list[Any]:
        return [variable for metric in getattr(self.model, "metrics", ()) for variable in metric.variables]


class KerasState(TensorFlowKerasState):
    """State of a Keras model and its optimizer: weights, optimizer state, and the attributes given by name.

    Args:
        model: A model that is built.
        optimizer: The optimizer that trains it; by default the one it was compiled with.
        kwargs: Further attributes, such as `epoch=0, batch=0`.

    Raises:
        ValueError: If the model is not built, or has no optimizer and none is given.
    """

    def __init__(self, model: Any, optimizer: Any = None, **kwargs: Any) -> None:
        super().__init__(model, optimizer, **kwargs)
