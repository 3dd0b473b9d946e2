"""Join the ranks and make all changes in Keras; importing this module loads Keras."""

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
    training,
)


def install(scale_batch: bool) -> None:
    """Join the ranks and make Keras work for all of them together.

    Args:
        scale_batch: Whether each rank keeps the batch size of the script.
    """
    hvd.init()
    model_fit.let_data_be_equal()  # every rank reads all data and computes only its rows
    engine = runtime.engine()
    randomness.install(engine)
    model_calls.install()
    layer_losses.install()
    embedding_lookups.install()
    normalization.install()
    optimizers.install()
    training.install(engine, scale_batch)
    native_files.install_saving(engine)
    native_files.install(engine)
    refusals.install_in_keras()
