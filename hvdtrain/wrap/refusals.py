"""What cannot be divided by one who does not know it is refused, before it could go wrong."""

import _thread
import builtins
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

from hvdtrain import runtime, script
from hvdtrain.patching import replace

_STRATEGIES = (
    "CentralStorageStrategy",
    "MirroredStrategy",
    "MultiWorkerMirroredStrategy",
    "OneDeviceStrategy",
    "ParameterServerStrategy",
    "TPUStrategy",
)
_ON_ONE_DEVICE = ("MirroredStrategy", "OneDeviceStrategy")
_OURS = ("hvdtrain", "horovod")
# These, and what unpickles their objects.
_MAY_IMPORT = {*_OURS, *sys.stdlib_module_names, "cloudpickle", "mpi4py"} - {"__main__"}
_RANKS = (
    "hvdtrain run --wrap is for scripts that know nothing of ranks, and this one imports {name}. Start it without "
    "--wrap: {typed}"
)
_STRATEGY = (
    "hvdtrain run --wrap: the script {what}, which divides the work in a way of its own. Leave it out, "
    "with its scope(), or start the script with python."
)
_THREAD = (
    "hvdtrain run --wrap: {what} is called in the thread {thread}. All ranks have to do the same steps in the same "
    "order, which threads do not keep. Call it in the main thread."
)

_in_threads: list[RuntimeError] = []


def run(words: Sequence[str]) -> None:
    """Runs the script; what was refused in one of its threads ends it too.

    Args:
        words: `script.py args...`, or `-m module args...`.
    """
    try:
        script.run(words)
    except KeyboardInterrupt:
        if not _in_threads:
            raise
    if _in_threads:
        raise _in_threads[0]


def check_thread(what: str) -> None:
    """Refuses a call that does not come from the main thread.

    Args:
        what: The call.

    Raises:
        RuntimeError: In that thread, and in the main thread as well.
    """
    thread = threading.current_thread()
    if thread is not threading.main_thread():
        _in_threads.append(RuntimeError(_THREAD.format(what=what, thread=thread.name)))
        _thread.interrupt_main()
        raise _in_threads[-1]


def install() -> None:
    """Refuses the import of hvdtrain and Horovod by anyone but themselves."""
    replace(builtins, "__import__", _without_ranks)


def install_in_keras() -> None:
    """Refuses strategies of TensorFlow and distributions of Keras."""
    import keras
    import tensorflow as tf

    for name in _ON_ONE_DEVICE:
        getattr(tf.distribute, name).__new__ = staticmethod(_default_on_one_device)
    for owner in (tf.distribute, tf.distribute.experimental):
        for name in _STRATEGIES:
            if hasattr(owner, name):
                replace(getattr(owner, name), "__init__", _refusing(f"makes a {name}"))
    replace(keras.distribution, "set_distribution", _refusing("sets a keras.distribution"))


def _without_ranks(load: Any) -> Any:
    def import_(name: str, namespace: Any = None, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in _OURS and not (args[1:2] or [kwargs.get("level", 0)])[0]:
            asker = str((namespace or {}).get("__name__", "")).partition(".")[0]
            if asker and asker not in _MAY_IMPORT:
                raise ImportError(_RANKS.format(name=name, typed=_typed(name)))
        return load(name, namespace, *args, **kwargs)

    return import_


def _typed(name: str) -> str:
    """Return the command that was typed, as it should have been for a script that imports this."""
    typed = os.environ.get("HVDTRAIN_RUN_TYPED", "hvdtrain run -np N script.py")
    mode = "hvdtrain run --as-horovod" if name.startswith("horovod") else "hvdtrain run"
    return typed.replace("hvdtrain run", mode, 1)


def _default_on_one_device(cls: Any, devices: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Return the default strategy, which divides nothing, in place of one of a single device."""
    import tensorflow as tf

    devices = kwargs.get("device", devices)
    found = tf.config.list_logical_devices("GPU") if devices is None else tf.nest.flatten(devices)
    if len(found) > 1:
        return object.__new__(cls)
    runtime.engine().say(f"{cls.__name__} has one device on each rank, and is taken as no strategy.")
    return tf.distribute.get_strategy()  # no instance of `cls`, so Python does not call its __init__


def _refusing(what: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(_STRATEGY.format(what=what))

    return lambda _: refuse
