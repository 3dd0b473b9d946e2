"""What Keras saves is written by rank 0, and is there for all when they go on."""

import inspect
import os
from collections.abc import Callable
from typing import Any

import keras

from hvdtrain.collectives.engine import Engine
from hvdtrain.patching import replace_where_defined
from hvdtrain.wrap import files
from hvdtrain.wrap.rank_zero import on_rank_zero


def install(engine: Engine) -> None:
    """Changes what saves models and weights.

    Args:
        engine: The ranks.
    """
    for name in ("save", "save_weights", "export"):
        replace_where_defined(keras.Model, name, lambda method: _by_rank_zero(engine, method))


def _by_rank_zero(engine: Engine, method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    def save(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        path = given.arguments.get("filepath")
        if not isinstance(path, str | os.PathLike):
            method(*given.args, **given.kwargs)
            return
        on_rank_zero(engine, lambda: method(*given.args, **given.kwargs))
        shared = not engine.rank or files.share(path)
        engine.barrier()  # only now may rank 0 remove it again, as BackupAndRestore does in the end
        if not shared:
            # On a disk that this host does not share with rank 0's: a copy of its own.
            given.arguments["filepath"] = files.private(path)
            method(*given.args, **given.kwargs)

    return save
