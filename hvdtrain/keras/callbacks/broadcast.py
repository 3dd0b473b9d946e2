"""All ranks start from the weights of one."""

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.collectives.engine import Call
from hvdtrain.data.global_batch import as_keras
from hvdtrain.gradients.naming import plain_variable
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.keras.broadcast_variables import broadcast_variables
from hvdtrain.keras.callbacks.membership import engine_of, optimizers_of, process_set_of
from hvdtrain.keras.optimizer.distributed import is_distributed


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Starts all ranks from the weights of one, whatever each has initialised or loaded.

    Before the first step, weights, non-trainable state (such as BatchNorm's statistics) and the optimizer's
    state are copied from `root_rank`. States of random generators are not: dropout goes on differing
    between ranks. Horovod copies after the first step, when it is too late for that step
    (https://horovod.readthedocs.io/en/stable/keras.html).

    While it is there it also compares, at the start of each epoch, the learning rate, which a callback may
    have changed on some ranks only, and at the end, that all ranks have come there.

    If the model's optimizer has a process set, all this concerns the ranks of that set only.

    Args:
        root_rank: The rank, of the whole world, whose values all take; usually the one that loads a checkpoint.
        device: Accepted for Horovod's sake; TensorFlow places the copies.
        local_variables: A variable, or several, that each rank keeps as its own.

    Raises:
        ValueError: If `local_variables` holds something else than variables.
        MismatchError: On every rank, if the ranks train different models, with different learning rates, or
            do not end together.
    """

    def __init__(
        self, root_rank: int = 0, device: str = "", local_variables: Any | Iterable[Any] | None = None
    ) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        self._local: list[Any] = []
        one = isinstance(local_variables, (tf.Variable, keras.Variable))
        for variable in [local_variables] if one else local_variables or ():
            self.register_local_var(variable)

    def register_local_var(self, var: Any) -> None:
        """Leave a variable to each rank as its own.

        Args:
            var: A Keras or TensorFlow variable of the model, or the optimizer's.

        Raises:
            ValueError: If it is none.
        """
        if not isinstance(var, (tf.Variable, keras.Variable)):
            raise ValueError(
                f"All local variables must be of type tf.Variable or keras.Variable. Received: {var!r} of type "
                f"{type(var).__name__}."
            )
        self._local.append(plain_variable(var))
        registry.note_local(var)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Copy everything before the first step; of a model not built yet, once its first batch is there."""
        engine = engine_of(self.model)
        if process_set_of(self.model).included() is False:
            return
        engine.check_root(self.root_rank, type(self).__name__)
        if engine.size == 1:
            return
        if not any(is_distributed(each) for each in optimizers_of(self.model)):
            engine.say(
                f"this model's optimizer, {type(self.model.optimizer).__name__}, is not distributed: each rank "
                "trains a model of its own from here on. Compile the model with hvd.DistributedOptimizer(...)."
            )
        parts = [each for each in self.model._flatten_layers() if each is not self.model]
        if all(each.built for each in parts or [self.model]):
            self._broadcast()
        else:
            self._broadcast_at_first_batch()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Make sure that all ranks learn at the same rate."""
        rates = [
            f"{type(each).__name__}, learning rate {float(each.learning_rate)!r}"
            for each in optimizers_of(self.model)
        ]
        engine_of(self.model).agree(Call(f"start of epoch {epoch + 1}", tuple(rates)))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Make sure that no rank goes on alone, waiting for gradients that never come."""
        engine_of(self.model).agree(Call("end of training"))

    def _broadcast(self) -> None:
        compiled = self.model.optimizer
        if is_distributed(compiled) and not compiled.built:
            compiled.build(self.model.trainable_variables)
        state = [variable for each in optimizers_of(self.model) for variable in each.variables]
        local = {id(each) for each in self._local}
        shared = [each for each in (*self.model.weights, *state) if id(plain_variable(each)) not in local]
        broadcast_variables(shared, self.root_rank, process_set_of(self.model))

    def _broadcast_at_first_batch(self) -> None:
        """Stand before the first step, where the shapes of a batch are known and nothing has been computed."""
        train = self.model.train_function

        def first(iterator: Any) -> Any:
            self.model.train_function = train
            self._build(iterator.element_spec)
            self._broadcast()
            return train(iterator)

        self.model.train_function = first

    def _build(self, batch: Any) -> None:
        inputs = keras.utils.unpack_x_y_sample_weight(as_keras(batch))[0]
        try:
            self.model(
                keras.tree.map_structure(lambda each: keras.KerasTensor(each.shape, each.dtype.name), inputs)
            )
        except Exception as error:
            raise ValueError(
                f"Rank {runtime.engine().rank}: the weights cannot be broadcast before the first step, because the "
                f"model is not built and cannot be built from its batches ({error}). Give it a keras.Input, or "
                "call it once on a batch before model.fit."
            ) from error
