"""When the script has imported Keras, and not before: it may want to set variables that Keras reads."""

import importlib
import sys

from hvdtrain.patching import AfterImport


def install(scale_batch: bool) -> None:
    """Waits for the script's import of TensorFlow or Keras, then joins the ranks and changes Keras.

    Args:
        scale_batch: Whether each rank keeps the script's batch.
    """
    # TensorFlow may compute before the script imports Keras; the ranks have to share the machine before.
    sys.meta_path.insert(0, AfterImport("tensorflow", lambda: importlib.import_module("keras")))
    sys.meta_path.insert(0, AfterImport("keras", lambda: _change(scale_batch)))
    if "keras" in sys.modules or "tensorflow" in sys.modules:  # by what Python loads before any script
        importlib.import_module("keras")
        _change(scale_batch)


def _change(scale_batch: bool) -> None:
    from hvdtrain.wrap.install import install

    install(scale_batch)
