"""Reject scripts that `--wrap` cannot distribute safely, and let all ranks end a script together."""

import _thread
import builtins
import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from hvdtrain import runtime, script, settings
from hvdtrain.collectives.engine import Call, MismatchError
from hvdtrain.collectives.errors import report
from hvdtrain.patching import replace
from hvdtrain.wrap import files

_ON_ONE_DEVICE = ("MirroredStrategy", "OneDeviceStrategy")
_STRATEGIES = (
    *("CentralStorageStrategy", "MultiWorkerMirroredStrategy", "ParameterServerStrategy", "TPUStrategy"),
    *_ON_ONE_DEVICE,
)
_OURS = ("hvdtrain", "horovod")
# Packages that may import hvdtrain and Horovod: themselves, and those that unpickle their objects.
_MAY_IMPORT = {*_OURS, *sys.stdlib_module_names, "cloudpickle", "mpi4py"} - {"__main__"}
_RANKS = (
    "hvdtrain run --wrap is for scripts written for one process, but this script imports {name}. Start it "
    "without --wrap: {typed}"
)
_STRATEGY = (
    "hvdtrain run --wrap: the script {what}, which divides the work by itself. Remove it and its scope(), "
    "or start the script with python."
)
_THREAD = (
    "hvdtrain run --wrap: {what} is called in the thread {thread}. All ranks must do the same steps in the same "
    "order, but the order of threads varies. Call it in the main thread."
)

_errors_in_threads: list[RuntimeError] = []


def run(arguments: Sequence[str]) -> None:
    """Run `script.py args...` or `-m module args...`; an error of `check_thread` in a thread ends it too."""
    with in_step():
        try:
            script.run(arguments)
        except KeyboardInterrupt:
            if not _errors_in_threads:
                raise
        if _errors_in_threads:
            raise _errors_in_threads[0]


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """Delay an error or `sys.exit` until all ranks have reached it or have been told about it.

    A rank that ends with an error would otherwise stop the others early.
    """
    try:
        yield
    except Exception as error:
        if runtime.is_initialized():
            report(runtime.engine(), "the script", error)
        files.remove_copies()  # a job that fails may be stopped before Python runs its exit functions
        raise
    except SystemExit as stop:
        if stop.code:
            if runtime.is_initialized():
                with contextlib.suppress(MismatchError):
                    runtime.engine().agree(Call(f"sys.exit({stop.code})", farewell=True))
            files.remove_copies()
        raise


def check_thread(what: str) -> None:
    """Raise RuntimeError outside the main thread, for the function `what`, and then in the main thread too."""
    thread = threading.current_thread()
    if thread is not threading.main_thread():
        _errors_in_threads.append(RuntimeError(_THREAD.format(what=what, thread=thread.name)))
        _thread.interrupt_main()
        raise _errors_in_threads[-1]


def reject_imports() -> None:
    """Reject imports of hvdtrain and Horovod by the script."""
    replace(builtins, "__import__", _rejecting_import)


def _rejecting_import(load: Any) -> Any:
    def import_(name: str, namespace: Any = None, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in _OURS and not (args[1:2] or [kwargs.get("level", 0)])[0]:
            importer = str((namespace or {}).get("__name__", "")).partition(".")[0]
            if importer and importer not in _MAY_IMPORT:
                typed = settings.get("HVDTRAIN_RUN_TYPED") or "hvdtrain run -np N script.py"
                mode = "hvdtrain run --as-horovod" if name.startswith("horovod") else "hvdtrain run"
                raise ImportError(_RANKS.format(name=name, typed=typed.replace("hvdtrain run", mode, 1)))
        return load(name, namespace, *args, **kwargs)

    return import_


def reject_strategies() -> None:
    """Reject strategies of TensorFlow and distributions of Keras."""
    import keras
    import tensorflow as tf

    for name in _ON_ONE_DEVICE:
        getattr(tf.distribute, name).__new__ = staticmethod(_default_on_one_device)
    for owner in (tf.distribute, tf.distribute.experimental):
        for name in _STRATEGIES:
            if hasattr(owner, name):
                replace(getattr(owner, name), "__init__", _rejecting(f"makes a {name}"))
    replace(keras.distribution, "set_distribution", _rejecting("sets a keras.distribution"))


def _default_on_one_device(cls: Any, devices: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Return the default strategy, which divides nothing, in place of a strategy with one device."""
    import tensorflow as tf

    devices = kwargs.get("device", devices)
    found = tf.config.list_logical_devices("GPU") if devices is None else tf.nest.flatten(devices)
    if len(found) > 1:
        return object.__new__(cls)
    runtime.engine().say(f"{cls.__name__} has one device on each rank, and is taken as no strategy.")
    return tf.distribute.get_strategy()  # not an instance of `cls`, so Python does not call its __init__


def _rejecting(what: str) -> Any:
    def reject(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(_STRATEGY.format(what=what))

    return lambda _: reject
