"""Scripts written for Horovod, run on hvdtrain without a change: `import horovod...` gives hvdtrain's own.

hvdtrain run --as-horovod -np 4 old_script.py
horovodrun -np 4 python -m hvdtrain.as_horovod old_script.py
"""

from hvdtrain import safe_path

safe_path.leave_working_directory()

import os
import sys

from hvdtrain.as_horovod import children, keras2, tf1
from hvdtrain.as_horovod.aliases import Aliases


def advice(error: BaseException) -> str:
    """Says what to change where a script ended at something of TensorFlow 1; nothing for another error."""
    return tf1.advice(error)


def install() -> None:
    """Lets `import horovod` and its modules for Keras and TensorFlow mean hvdtrain's, from now on in this process.

    Calls of Keras 2 that Horovod's documentation prescribes work too (see keras2.py). Neither TensorFlow nor MPI
    is loaded before the script does so. A second call changes nothing.

    Raises:
        RuntimeError: If Horovod itself has been imported already.
    """
    if any(isinstance(each, Aliases) for each in sys.meta_path):
        return
    if "horovod" in sys.modules:
        raise RuntimeError(
            "Horovod itself is imported already, so its name cannot mean hvdtrain in this process. Call "
            "hvdtrain.as_horovod.install() before anything imports horovod."
        )
    # These scripts may make the ranks equal after their first step, as Horovod's callbacks and examples do.
    os.environ.setdefault("HVDTRAIN_VERIFY", "second")
    sys.meta_path.insert(0, Aliases())
    keras2.install_with_keras()
    children.follow(install)
