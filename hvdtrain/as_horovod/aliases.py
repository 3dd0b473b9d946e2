"""Which module of hvdtrain stands behind each name of Horovod's, and the finder that tells Python so."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SERVED = {
    "horovod": "hvdtrain.as_horovod.package",
    "horovod.common": "hvdtrain.as_horovod.common",
    "horovod.common.basics": "hvdtrain.as_horovod.common.basics",
    "horovod.common.elastic": "hvdtrain.keras.elastic",
    "horovod.common.exceptions": "hvdtrain.as_horovod.common.exceptions",
    "horovod.common.process_sets": "hvdtrain.runtime.process_sets",
    "horovod.common.util": "hvdtrain.as_horovod.common.util",
    "horovod.keras": "hvdtrain.as_horovod.standalone_keras",
    "horovod.keras.callbacks": "hvdtrain.keras.callbacks",
    "horovod.keras.elastic": "hvdtrain.keras.elastic",
    "horovod.tensorflow": "hvdtrain.tensorflow",
    "horovod.tensorflow.compression": "hvdtrain.tensorflow.compression",
    "horovod.tensorflow.elastic": "hvdtrain.keras.elastic",
    "horovod.tensorflow.functions": "hvdtrain.tensorflow.functions",
    "horovod.tensorflow.keras": "hvdtrain.keras",
    "horovod.tensorflow.keras.callbacks": "hvdtrain.keras.callbacks",
    "horovod.tensorflow.keras.elastic": "hvdtrain.keras.elastic",
    "horovod.tensorflow.mpi_ops": "hvdtrain.tensorflow.mpi_ops",
    "horovod.tensorflow.sync_batch_norm": "hvdtrain.tensorflow.sync_batch_norm",
    "horovod.tensorflow.util": "hvdtrain.tensorflow.util",
}

# What a module has from Python, not from what stands behind it.
_OWN = {
    "__builtins__",
    "__cached__",
    "__doc__",
    "__file__",
    "__loader__",
    "__name__",
    "__package__",
    "__path__",
}


class Aliases(MetaPathFinder):
    """Finds `horovod` and its modules for Keras and TensorFlow in hvdtrain, whether Horovod is installed or not."""

    # By this the horovod engine knows what to set aside while it loads Horovod's native core.
    stands_in_for_horovod = True

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answers for Horovod's names and for no other.

        Raises:
            ModuleNotFoundError: If it is a module of Horovod's that has nothing to do with Keras or TensorFlow.
        """
        if fullname.partition(".")[0] != "horovod":
            return None
        if fullname not in SERVED:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: this script runs with hvdtrain in the place of Horovod, which "
                "serves horovod.keras and horovod.tensorflow only. Run what needs another part of Horovod with "
                "Horovod itself: horovodrun -np N python script.py"
            )
        return ModuleSpec(fullname, _Alias(), origin=SERVED[fullname], is_package=bool(_children(fullname)))


class _Alias(Loader):
    """Fills a module of Horovod's name with what hvdtrain has for it."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Leaves it to Python to make an empty module."""

    def exec_module(self, module: ModuleType) -> None:
        source = importlib.import_module(SERVED[module.__name__])
        if "hvdtrain.keras" in sys.modules:
            # In Horovod ranks may validate as they like, rank 0 alone for one.
            importlib.import_module("hvdtrain.keras.patches.model_fit").let_each_validate()
        vars(module).update(_content(source))
        module.__doc__ = f"{source.__name__}, by the name that it has in Horovod."
        if module.__name__ != "horovod":
            # Scripts reach them as attributes: hvd.callbacks, hvd.elastic.
            for child in _children(module.__name__):
                importlib.import_module(child)


def _content(source: ModuleType) -> dict[str, Any]:
    named = {name: value for name, value in vars(source).items() if name not in _OWN and name != "__spec__"}
    return {name: value for name, value in named.items() if not isinstance(value, ModuleType)}


def _children(name: str) -> list[str]:
    return [each for each in SERVED if each.rpartition(".")[0] == name]
