"""Start all ranks from the weights of one rank, and from random states that differ between the ranks."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.random.seed_generator import global_seed_generator

from hvdtrain import runtime
from hvdtrain.collectives.agreement import root_index
from hvdtrain.collectives.engine import Call
from hvdtrain.data.global_batch import as_keras
from hvdtrain.gradients.naming import plain_variable
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.keras.collectives import broadcast_variables
from hvdtrain.keras.membership import engine_of, optimizers_of, process_set_of
from hvdtrain.keras.optimizer.distributed import is_distributed, scheme_states


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Starts all ranks from the weights of one rank, which replace those that each rank has initialised or loaded.

    Before the first step, weights, non-trainable state (such as BatchNorm's statistics) and the optimizer's
    state are copied from `root_rank`. States of random generators are not copied, so dropout masks still
    differ between ranks. Horovod copies after the first step, when it is too late for that step
    (https://horovod.readthedocs.io/en/stable/keras.html).

    At the start of each epoch it also compares the learning rates, which a callback may have changed on some ranks
    only, and at the end of training it checks that all ranks have reached it.

    If the model's optimizer has a process set, this applies to the ranks of that set only.

    Args:
        root_rank: The rank, among all ranks, whose values are copied to all; usually the rank that loads a
            checkpoint.
        device: Accepted for compatibility with Horovod; TensorFlow places the copies.
        local_variables: A variable, or several, that are not copied: each rank keeps its own value.

    Raises:
        ValueError: If `local_variables` contains an object that is not a variable.
        MismatchError: On every rank, if the ranks train different models, with different learning rates, or
            some ranks end training earlier.
    """

    def __init__(
        self, root_rank: int = 0, device: str = "", local_variables: Any | Iterable[Any] | None = None
    ) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        self._local: list[Any] = []
        single = isinstance(local_variables, (tf.Variable, keras.Variable))
        for variable in [local_variables] if single else local_variables or ():
            self.register_local_var(variable)

    def register_local_var(self, var: Any) -> None:
        """Register a variable that is not copied, so that each rank keeps its own value.

        Args:
            var: A Keras or TensorFlow variable of the model, or the optimizer's.

        Raises:
            ValueError: If it is not a variable.
        """
        if not isinstance(var, (tf.Variable, keras.Variable)):
            raise ValueError(
                f"All local variables must be of type tf.Variable or keras.Variable. Received: {var!r} of type "
                f"{type(var).__name__}."
            )
        self._local.append(plain_variable(var))
        registry.note_local(var)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Copy all variables before the first step; if the model is not built, when its first batch is known."""
        engine = engine_of(self.model)
        if process_set_of(self.model).included() is False:
            return
        root_index(engine.ranks, self.root_rank, type(self).__name__)
        if engine.size == 1:
            return
        if not any(is_distributed(optimizer) for optimizer in optimizers_of(self.model)):
            engine.say(
                f"this model's optimizer, {type(self.model.optimizer).__name__}, is not distributed: each rank "
                "trains its own model. Compile the model with hvd.DistributedOptimizer(...)."
            )
        layers = [layer for layer in self.model._flatten_layers() if layer is not self.model]
        if all(layer.built for layer in layers or [self.model]):
            self._broadcast()
        else:
            self._broadcast_at_first_batch()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Raise an error unless all ranks have the same learning rates."""
        rates = [
            f"{type(optimizer).__name__}, learning rate {float(optimizer.learning_rate)!r}"
            for optimizer in optimizers_of(self.model)
        ]
        engine_of(self.model).agree(Call(f"start of epoch {epoch + 1}", tuple(rates)))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Raise an error on ranks that would still wait for gradients of a rank that has ended."""
        engine_of(self.model).agree(Call("end of training"))

    def _broadcast(self) -> None:
        compiled = self.model.optimizer
        if is_distributed(compiled) and not compiled.built:
            compiled.build(self.model.trainable_variables)
        state = [variable for optimizer in optimizers_of(self.model) for variable in optimizer.variables]
        local = {id(variable) for variable in self._local}
        shared = [var for var in (*self.model.weights, *state) if id(plain_variable(var)) not in local]
        broadcast_variables(shared, self.root_rank, process_set_of(self.model))
        engine = engine_of(self.model)
        for remembered in scheme_states(optimizers_of(self.model)):
            remembered.shared.update(engine.broadcast_object(remembered.shared, self.root_rank))

    def _broadcast_at_first_batch(self) -> None:
        """Broadcast before the first step, when the shapes of a batch are known and nothing is computed yet."""
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
            symbolic = lambda spec: keras.KerasTensor(spec.shape, spec.dtype.name)  # noqa: E731
            self.model(keras.tree.map_structure(symbolic, inputs))
        except Exception as error:
            raise ValueError(
                f"Rank {runtime.engine().rank}: the weights cannot be broadcast before the first step, because the "
                f"model is not built and cannot be built from its batches ({error}). Give it a keras.Input, or "
                "call it once on a batch before model.fit."
            ) from error


class RandomStatesCallback(keras.callbacks.Callback):
    """Lets Dropout and augmentation layers draw different numbers on each rank, from one seed.

    `keras.utils.set_random_seed(seed)` with the same seed on all ranks gives equal weights, and would also give
    equal dropout masks: N ranks would drop the same units in the same step. When training starts, each random
    generator of the model takes the state of the first rank, with the rank mixed into its seed (NumPy's
    SeedSequence). The first rank keeps its state. So a repeated run is the same, a run resumed from a checkpoint
    continues with its masks, and it does not matter if the ranks were seeded differently or not at all.

    `hvd.callbacks.distributed` adds this callback.
    """

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Set the generators' states."""
        engine, states = engine_of(self.model), states_of(self.model)
        if engine.size == 1:
            return
        engine.agree(Call("states of random generators", (f"{len(states)} generators",)))
        roots = engine.broadcast_object([state.numpy() for state in states], engine.ranks[0])
        for state, root in zip(states, roots, strict=True):
            state.assign(folded(root, engine.rank))


def states_of(model: keras.Model) -> list[Any]:
    """List the states of a model's random generators, and of Keras' global generator."""
    generators = [generator for layer in model._flatten_layers() for generator in layer._seed_generators]
    states = [generator.state for generator in (*generators, global_seed_generator())]
    return list({id(state): state for state in states}.values())


def folded(state: np.ndarray, rank: int) -> np.ndarray:
    """Return the state (seed, count) with a rank mixed into the seed; for rank 0, the state itself."""
    seed, *rest = state
    if rank:
        seed = np.random.SeedSequence((int(seed) % 2**32, rank)).generate_state(1)[0] >> 1  # fits an int32
    return np.array([seed, *rest], state.dtype)
