"""State of a Keras model and its optimizer."""

from typing import Any

from hvdtrain.keras.elastic.variables import VariablesState, distinct


class TensorFlowKerasState(VariablesState):
    """State of a Keras model and its optimizer: weights, optimizer state, and the attributes given by name.

    States of random generators and half-accumulated gradients belong to each rank alone; all else is shared.

    Args:
        model: A model that is built.
        optimizer: The optimizer that trains it; by default the one it was compiled with.
        backend: Accepted for Horovod's sake, where TensorFlow 1 needed it.
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
        """List the optimizer, and that of `compile` should it be another: a loss scale around it, or a copy."""
        known = [self.optimizer, getattr(self.model, "optimizer", None)]
        optimizers = [each for each in dict.fromkeys(known) if each is not None]
        for each in optimizers:
            if not each.built:
                each.build(self.model.trainable_variables)
        return optimizers

    def _shared(self) -> list[Any]:
        state = [each for optimizer in self._optimizers() for each in optimizer.variables]
        apart = {id(each) for each in self._accumulators()}
        return distinct([*self.model.weights, *(each for each in state if id(each) not in apart)])

    def _own(self) -> list[Any]:
        weights = {id(each) for each in self.model.weights}
        generators = [each for each in self.model.variables if id(each) not in weights]
        return distinct([*generators, *self._accumulators()])

    def _accumulators(self) -> list[Any]:
        inner = [getattr(each, "inner_optimizer", each) for each in self._optimizers()]
        return [each for optimizer in inner for each in getattr(optimizer, "_accumulated_gradients", ())]

    def _metrics(self) -> list[Any]:
        return [each for metric in getattr(self.model, "metrics", ()) for each in metric.variables]


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
