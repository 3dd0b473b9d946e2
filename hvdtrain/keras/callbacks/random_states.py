"""Let Dropout and augmentation layers draw different, reproducible numbers on each rank."""

from typing import Any

import keras
import numpy as np
from keras.src.random.seed_generator import global_seed_generator

from hvdtrain.collectives.engine import Call
from hvdtrain.keras.callbacks.membership import engine_of


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
