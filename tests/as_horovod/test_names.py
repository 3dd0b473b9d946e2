"""In old scripts the names of Horovod's modules stand for hvdtrain's."""

import pytest

EVERY_NAME = """
import importlib, sys
import horovod
import horovod.keras
import horovod.tensorflow as hvd
import horovod.tensorflow.keras as hk
from horovod.tensorflow import keras as again
from horovod.tensorflow.keras.callbacks import MetricAverageCallback
from horovod.keras import callbacks, elastic
from horovod.common.process_sets import ProcessSet, global_process_set
from horovod.common.exceptions import HorovodInternalError
from horovod.common.util import gpu_available, num_rank_is_power_2, is_version_greater_equal_than
from horovod.tensorflow.mpi_ops import rank, _allreduce, Average, Sum
from horovod.tensorflow.functions import broadcast_object
from horovod.tensorflow.compression import Compression
from horovod.tensorflow.sync_batch_norm import SyncBatchNormalization
from horovod.tensorflow.util import _executing_eagerly
import hvdtrain.keras, hvdtrain.tensorflow

assert horovod.__version__ == "0.28.1"
assert hk is again is importlib.import_module("horovod.tensorflow.keras")
assert hk.DistributedOptimizer is hvdtrain.keras.DistributedOptimizer
assert hvd.DistributedGradientTape is hvdtrain.tensorflow.DistributedGradientTape
assert hk.callbacks.MetricAverageCallback is callbacks.MetricAverageCallback is MetricAverageCallback
assert hvd.elastic.run is elastic.run is hk.elastic.run
assert hvd.ProcessSet is ProcessSet and hk.global_process_set is global_process_set
assert not gpu_available("tensorflow") and num_rank_is_power_2(4)
assert is_version_greater_equal_than("2.10.0", "2.9.1")
assert issubclass(HorovodInternalError, RuntimeError) and _executing_eagerly()
assert not any("site-packages/horovod" in str(getattr(each, "__file__", "")) for each in sys.modules.values())
try:
    import horovod.torch
except ModuleNotFoundError as error:
    assert "serves horovod.keras and horovod.tensorflow only" in str(error)
hvd.init()
import keras
in_keras_order = horovod.keras.DistributedOptimizer(
    keras.optimizers.SGD(0.1), None, "", "", hk.Compression.none, False, 1.0, hk.Sum, 0, None
)
assert in_keras_order.gradient_accumulation_steps is None
assert hvd.size() == hk.size() == rank() + 1 == 1
print(sys.argv, __name__, __file__)
"""


def test_every_module_of_horovods(scripts):
    ended = scripts.alone(EVERY_NAME, "--epochs", "3")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"['old_script.py', '--epochs', '3'] __main__ {scripts.folder}/old_script.py\n"


TWO_ENGINES = """
import sys
import numpy as np
import tensorflow as tf
import horovod.tensorflow as hvd

hvd.init()
total = hvd.allreduce(tf.constant([float(hvd.rank() + 1)]), op=hvd.Sum)
from hvdtrain import runtime
assert runtime.engine().name == sys.argv[1]
import horovod.tensorflow as later
assert later is hvd and hvd.__doc__.startswith("hvdtrain.tensorflow")
if hvd.rank() == 0:
    print(float(total[0]), hvd.size())
"""


@pytest.mark.parametrize("engine", ["mpi", "horovod"])
def test_the_real_core_may_run_beneath(scripts, engine):
    if engine == "horovod":
        pytest.importorskip("horovod", reason="Horovod is not built here")
    ended = scripts.run(TWO_ENGINES, engine, engine=engine)
    assert ended.returncode == 0, ended.stderr
    assert "3.0 2" in ended.stdout


@pytest.mark.smoke
def test_a_module_and_its_exit_code(scripts):
    scripts.write(
        "import sys, horovod.keras as hvd\nhvd.init()\nprint(sys.argv[1:], __name__)\nsys.exit(7)", "task.py"
    )
    ended = scripts.run("", start=[*scripts.as_horovod, "-m", "task"])
    assert (ended.returncode, ended.stdout) == (7, "['old_script.py'] __main__\n")


def test_a_script_that_is_not_there(scripts):
    ended = scripts.run("", start=[*scripts.as_horovod, "none.py"])
    assert ended.returncode == 2 and "none.py is not there" in ended.stderr


@pytest.mark.parametrize(
    "line, told",
    [
        ("tf.Session()", "no sessions"),
        ("tf.ConfigProto()", "no sessions"),
        ("tf.train.MonitoredTrainingSession()", "no monitored sessions"),
        ("tf.estimator.Estimator()", "no estimators"),
        ("tf.train.AdamOptimizer(0.1)", "tf.keras.optimizers.Adam"),
        ("tf.placeholder(tf.float32)", "@tf.function"),
    ],
)
def test_tensorflow_1_gets_a_sentence(scripts, line, told):
    from hvdtrain.as_horovod import advice

    tensorflow = pytest.importorskip("tensorflow")
    with pytest.raises(AttributeError) as caught:
        eval(line, {"tf": tensorflow})
    assert told in advice(caught.value)


def test_the_sentence_follows_the_traceback_once(scripts):
    ended = scripts.run(
        "import tensorflow as tf\nimport horovod.keras as hvd\nhvd.init()\nsession = tf.Session()\n"
    )
    assert ended.returncode == 1
    assert ended.stderr.count("TensorFlow has no sessions any more") == 1
    assert "session = tf.Session()" in ended.stderr and "script.py" not in ended.stderr.replace(
        "old_script.py", ""
    )


def test_an_error_elsewhere_gets_none():
    from hvdtrain.as_horovod import advice

    assert not advice(AttributeError("module 'numpy' has no attribute 'Session'"))
    assert not advice(ValueError("tf.Session"))
