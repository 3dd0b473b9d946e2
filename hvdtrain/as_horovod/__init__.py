"""Run scripts written for Horovod without a change: `import horovod...` imports hvdtrain's modules instead.

hvdtrain run --as-horovod -np 4 old_script.py
horovodrun -np 4 python -m hvdtrain.as_horovod old_script.py
"""

from hvdtrain import safe_path

safe_path.leave_working_directory()

import functools
import os
import re
import sys
from multiprocessing import spawn
from typing import Any

from hvdtrain.as_horovod.aliases import Aliases
from hvdtrain.patching import AfterImport


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
    if "keras" in sys.modules:
        _accept_keras2()
    else:
        sys.meta_path.insert(0, AfterImport("keras", _accept_keras2))
    _install_in_children()


def _accept_keras2() -> None:
    import keras

    if keras.__version__.startswith("2.") or keras.backend.backend() != "tensorflow":
        return  # hvdtrain.keras rejects both with a message
    from hvdtrain.as_horovod import keras2

    keras2.install()


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


_SESSION = (
    "TensorFlow has no sessions any more. Delete the lines with ConfigProto, Session and set_session; hvd.init() "
    "gives each rank its own GPU and its cores."
)
_HOOK = (
    "TensorFlow has no monitored sessions and hooks any more. Train a keras.Model with model.fit(..., "
    "callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)]), or in a loop with hvd.DistributedGradientTape "
    "and hvd.broadcast_variables(model.variables, root_rank=0)."
)
_ESTIMATOR = (
    "TensorFlow has no estimators since 2.16. Build a keras.Model in the place of model_fn, and train it with "
    "model.compile(hvd.DistributedOptimizer(...)) and model.fit."
)
_OPTIMIZER = (
    "this optimizer of TensorFlow 1 became one of tf.keras.optimizers, such as tf.keras.optimizers.Adam(0.001). "
    "Give that to hvd.DistributedOptimizer for model.compile, or use hvd.DistributedGradientTape in a loop."
)
_GRAPH = (
    "this belongs to the graphs of TensorFlow 1. Write the model as a keras.Model and the step as a @tf.function "
    "that takes the data as arguments, with hvd.DistributedGradientTape."
)
_SCRIPT = (
    "tf.app, tf.flags and tf.contrib are gone. Use argparse, and call main() under "
    "`if __name__ == '__main__':`."
)
_GPUS = "each rank has one GPU here. Delete the call; -np and hvd.DistributedOptimizer take its place."
_PHASE = (
    "Keras 3 has no learning phase. Call the model or layer with training=True or training=False; fit, evaluate "
    "and predict do so."
)

# Patterns for the whole missing name, with the advice. The first match counts.
_ADVICE = (
    (r"Session|InteractiveSession|ConfigProto|GPUOptions|set_session|get_session", _SESSION),
    (r"MonitoredTrainingSession|MonitoredSession|SessionRunHook|\w+Hook|Scaffold|\w*global_step", _HOOK),
    (r"estimator|EstimatorSpec|experimental_distribute", _ESTIMATOR),
    (r"(Adam|Adagrad|Adadelta|GradientDescent|Momentum|RMSProp|Ftrl|ProximalAdagrad)Optimizer", _OPTIMIZER),
    (r"placeholder\w*|get_variable|variable_scope|\w+_initializer|global_variables|Graph\w*", _GRAPH),
    (r"get_default_graph|reset_default_graph|disable_eager_execution|layers|assign\w*|losses", _GRAPH),
    (r"multi_gpu_model", _GPUS),
    (r"learning_phase|set_learning_phase|in_train_phase|in_test_phase", _PHASE),
    (r"app|flags|contrib|logging|gfile", _SCRIPT),
)
_MISSING = re.compile(
    r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'"
    r"|cannot import name '(?P<imported>\w+)' from '(?P<source>[\w.]+)'"
    r"|No module named '(?P<nothing>tensorflow\.[\w.]+)'"
)


def advice(error: BaseException) -> str:
    """Return advice if a script used a name that TensorFlow 2 or Keras 3 does not have.

    Args:
        error: The exception that the script did not catch.

    Returns:
        One or two sentences; "" for any other error.
    """
    missing = _MISSING.search(str(error)) if isinstance(error, AttributeError | ImportError) else None
    if missing is None:
        return ""
    parts = missing.groupdict(default="")
    module = parts["module"] or parts["source"] or parts["nothing"]
    name = parts["name"] or parts["imported"] or module.split(".")[1]
    if module.partition(".")[0] not in ("tensorflow", "keras", "horovod", "hvdtrain"):
        return ""
    for pattern, text in _ADVICE:
        if re.fullmatch(pattern, name):
            return f"hvdtrain: {name}: {text}"
    return ""
