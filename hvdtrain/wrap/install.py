"""All that is changed in Keras, in one place."""

import hvdtrain.keras as hvd
from hvdtrain import runtime
from hvdtrain.keras import fitting, seams
from hvdtrain.wrap import (
    calls,
    chance,
    lookups,
    losses,
    native,
    normalization,
    optimizers,
    refusals,
    saving,
    training,
)


def install(scale_batch: bool) -> None:
    """Joins the ranks and makes Keras work for all of them together.

    Args:
        scale_batch: Whether each rank keeps the script's batch.
    """
    hvd.init()
    fitting.install(check_data=False)  # every rank reads all of it, and computes its rows
    engine = runtime.engine()
    chance.install(engine)
    seams.install()
    calls.install()
    losses.install()
    lookups.install()
    normalization.install()
    optimizers.install()
    training.install(engine, scale_batch)
    saving.install(engine)
    native.install(engine)
    refusals.install_in_keras()
