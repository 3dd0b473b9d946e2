"""Stop a script that uses stock Horovod with Keras 3, where Horovod averages no gradients."""

import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hvdtrain import settings
from hvdtrain.launch.supervision import protocol
from hvdtrain.patching import AfterImport, replace


class StockHorovodExit(SystemExit):
    """Raised if the script initializes stock Horovod with Keras 3: each rank would train a separate model."""


def watch(command: Sequence[str]) -> None:
    """Stop the script at Horovod's `init`, because only then it is known which Keras it has imported.

    Args:
        command: The script and its arguments.
    """
    sys.meta_path.insert(0, AfterImport("horovod.common.basics", lambda: _replace_init(command)))


def _replace_init(command: Sequence[str]) -> None:
    replace(sys.modules["horovod.common.basics"].HorovodBasics, "init", _make_init(command))


def _make_init(command: Sequence[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(init: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _averages_nothing():
                raise StockHorovodExit(_message(command))
            return init(self, *args, **kwargs)

        return run

    return make


def _averages_nothing() -> bool:
    """Return whether the script uses Horovod for TensorFlow with Keras 3, other than as the engine of hvdtrain."""
    library = sys.modules.get("hvdtrain.collectives.horovod.library")
    if library is not None and library.serves_hvdtrain:
        return False
    keras = sys.modules.get("keras")
    keras3 = keras is not None and not getattr(keras, "__version__", "2").startswith("2.")
    # With tf_keras (TF_USE_LEGACY_KERAS=1 or imported by name) Horovod works.
    return keras3 and "horovod.tensorflow" in sys.modules and "tf_keras" not in sys.modules


def _message(command: Sequence[str]) -> str:
    typed = settings.get(protocol.TYPED) or shlex.join(["hvdtrain", "run", "-np", "N", *command])
    version = sys.modules["keras"].__version__
    return (
        f"stock Horovod averages no gradients under Keras {version}, so each rank would train a separate model; "
        f"type: {typed.replace('hvdtrain run', 'hvdtrain run --as-horovod', 1)}"
    )
