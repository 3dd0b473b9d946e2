"""Dropout and augmentation layers draw other numbers on each rank, and the same again in a repeated run."""

from typing import Any

import keras
import numpy as np
from keras.src.random.seed_generator import global_seed_generator

from hvdtrain.collectives.engine import Call
from hvdtrain.keras.callbacks.membership import engine_of


class RandomStatesCallback(keras.callbacks.Callback):
    """Lets Dropout and augmentation layers draw other numbers on each rank, from one seed.

    `keras.utils.set_random_seed(seed)` with the same seed on all ranks makes equal weights, and would also make
    equal dropout masks: N ranks would drop the same units at once. When training starts, each random generator
    of the model takes the state of the first rank with the rank folded into its seed (NumPy's SeedSequence). The
    first rank keeps what it has. So a repeated run is the same, one that goes on from a checkpoint goes on with
    its masks, and ranks that were seeded differently or not at all lose nothing.

    `hvd.callbacks.distributed` adds this callback.
    """

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Set the generators' states."""
        engine, states = engine_of(self.model), states_of(self.model)
        if engine.size == 1:
            return
        engine.agree(Call("states of random generators", (f"{len(states)} generators",)))
        roots = engine.broadcast_object([each.numpy() for each in states], engine.ranks[0])
        for state, root in zip(states, roots, strict=True):
            state.assign(folded(root, engine.rank))


def states_of(model: keras.Model) -> list[Any]:
    """List the states of a model's random generators, and of the one that Keras uses where there is none."""
    generators = [each for layer in model._flatten_layers() for each in layer._seed_generators]
    states = [each.state for each in (*generators, global_seed_generator())]
    return list({id(each): each for each in states}.values())


def folded(state: np.ndarray, rank: int) -> np.ndarray:
    """Return the state (seed, count) with a rank folded into the seed; that of rank 0 is the state itself."""
    seed, *rest = state
    if rank:
        seed = np.random.SeedSequence((int(seed) % 2**32, rank)).generate_state(1)[0] >> 1  # fits an int32
    return np.array([seed, *rest], state.dtype)
