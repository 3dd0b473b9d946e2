"""Run scripts written for Horovod without a change: `import horovod...` imports hvdtrain's modules instead.

hvdtrain run --as-horovod -np 4 old_script.py
horovodrun -np 4 python -m hvdtrain.as_horovod old_script.py
"""

from hvdtrain import safe_path

safe_path.leave_working_directory()

import functools
import os
import sys
from multiprocessing import spawn
from typing import Any

from hvdtrain.as_horovod import keras2, tf1
from hvdtrain.as_horovod.aliases import Aliases


def advice(error: BaseException) -> str:
    """Return what to change in a script that ended at a name of TensorFlow 1; "" for any other error."""
    return tf1.advice(error)


def install() -> None:
    """Let `import horovod` and its modules for Keras and TensorFlow mean hvdtrain's, from now on in this process.

    Calls of Keras 2 that the documentation of Horovod prescribes work too (see keras2.py). Neither TensorFlow nor
    MPI is loaded before the script does so. A second call changes nothing.

    Raises:
        RuntimeError: If Horovod itself has been imported already.
    """
    if any(isinstance(finder, Aliases) for finder in sys.meta_path):
        return
    if "horovod" in sys.modules:
        raise RuntimeError(
            "Horovod itself is imported already, so its name cannot mean hvdtrain in this process. Call "
            "hvdtrain.as_horovod.install() before anything imports horovod."
        )
    # These scripts may make the ranks equal after their first step, as the callbacks and examples of Horovod do.
    os.environ.setdefault("HVDTRAIN_VERIFY", "second")
    sys.meta_path.insert(0, Aliases())
    keras2.install_with_keras()
    _install_in_children()


def _install_in_children() -> None:
    """Call `install` in processes that `multiprocessing` starts by "spawn" and "forkserver".

    Forked processes have the changes already.
    """
    prepare = spawn.get_preparation_data

    @functools.wraps(prepare)
    def prepare_and_install(name: str) -> dict[str, Any]:
        return {"hvdtrain_as_horovod": _Install(), **prepare(name)}

    spawn.get_preparation_data = prepare_and_install


class _Install:
    """An object that calls `install` when a new process unpickles it, before that process imports the script."""

    def __reduce__(self) -> tuple[Any, ...]:
        return install, ()
