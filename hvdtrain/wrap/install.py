"""All that is changed in Keras, in one place."""

import hvdtrain.keras as hvd
from hvdtrain import runtime
from hvdtrain.keras.patches import model_fit
from hvdtrain.wrap import (
    embedding_lookups,
    layer_losses,
    model_calls,
    native_files,
    normalization,
    optimizers,
    randomness,
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
    model_fit.install(check_data=False)  # every rank reads all of it, and computes its rows
    engine = runtime.engine()
    randomness.install(engine)
    model_calls.install()
    layer_losses.install()
    embedding_lookups.install()
    normalization.install()
    optimizers.install()
    training.install(engine, scale_batch)
    saving.install(engine)
    native_files.install(engine)
    refusals.install_in_keras()
