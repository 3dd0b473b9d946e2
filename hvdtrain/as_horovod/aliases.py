"""Map the module names of Horovod to modules of hvdtrain, for `import horovod`."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SERVED = {
    "horovod": "hvdtrain.as_horovod.package",
    "horovod.common": "hvdtrain.as_horovod.common",
    "horovod.common.basics": "hvdtrain.as_horovod.common",
    "horovod.common.elastic": "hvdtrain.keras.elastic",
    "horovod.common.exceptions": "hvdtrain.as_horovod.common",
    "horovod.common.process_sets": "hvdtrain.runtime.process_sets",
    "horovod.common.util": "hvdtrain.as_horovod.common",
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


class Aliases(MetaPathFinder):
    """A finder of `horovod` and its modules for Keras and TensorFlow, whether Horovod is installed or not."""

    # The horovod engine looks for this attribute, and removes the finder while it loads the native core of Horovod.
    stands_in_for_horovod = True

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module of Horovod, None for any other module.

        Raises:
            ModuleNotFoundError: If it is a module of Horovod that hvdtrain does not serve.
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
    """A loader that fills a module of Horovod with the content of a module of hvdtrain."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python to make an empty module."""

    def exec_module(self, module: ModuleType) -> None:
        source = importlib.import_module(SERVED[module.__name__])
        if "hvdtrain.keras" in sys.modules:
            # In Horovod each rank may validate or not, for example only rank 0.
            importlib.import_module("hvdtrain.keras.patches.model_fit").let_each_validate()
        own = {*vars(module), "__builtins__", "__cached__", "__file__", "__path__"}  # set by Python
        for name, value in vars(source).items():
            if name not in own and not isinstance(value, ModuleType):
                setattr(module, name, value)
        module.__doc__ = f"{source.__name__}, by the name that it has in Horovod."
        if module.__name__ != "horovod":
            # Scripts use them as attributes: hvd.callbacks, hvd.elastic.
            for child in _children(module.__name__):
                importlib.import_module(child)


def _children(name: str) -> list[str]:
    return [child for child in SERVED if child.rpartition(".")[0] == name]
