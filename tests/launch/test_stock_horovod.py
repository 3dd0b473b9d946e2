"""Stock Horovod beside Keras 3 averages nothing: the job is stopped before it trains, with the line to type."""

import importlib.util

import pytest

from hvdtrain.launch.run_options import RunOptions, command_line

horovod = pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod is not built")

STOCK = """
import sys
{first}
import horovod.tensorflow.keras as hvd
{second}
hvd.init()
print("rank", hvd.rank(), "trains", flush=True)
"""


@horovod
def test_it_is_stopped_before_it_trains_with_the_command_that_was_typed(jobs):
    script = STOCK.format(first="import keras", second="")
    done = jobs.run(script, "--lr", "0.1 2", options=("--bind", "none"), opening="", np=2)
    assert done.returncode == 1 and b"trains" not in done.stdout
    # A line about the other rank may come before it, if that rank failed before the launcher ended it.
    last = done.stderr.splitlines()[-1]
    assert "stock Horovod averages no gradients under Keras 3" in last
    assert last.endswith("type: hvdtrain run --as-horovod -np 2 --bind none 'the script.py' --lr '0.1 2'")


@horovod
@pytest.mark.parametrize(
    "first, second, environ",
    [
        ("", "", {"TF_USE_LEGACY_KERAS": "1"}),
        ("", "import tf_keras", {}),
        (
            "import hvdtrain.keras as ours; ours.init()",
            "hvd.init = lambda: None",
            {"HVDTRAIN_ENGINE": "horovod"},
        ),
    ],
    ids=["legacy", "tf_keras", "engine"],
)
def test_where_horovod_works_it_is_left_alone(jobs, first, second, environ):
    if environ.get("HVDTRAIN_ENGINE") is None:
        pytest.importorskip("tf_keras")
    done = jobs.run(STOCK.format(first=first, second=second), opening="", np=2, **environ)
    assert done.returncode == 0 and done.stdout.count(b"trains") == 2, done.stderr


def test_a_command_is_typed_with_all_its_options():
    options = RunOptions(4, "train.py", ("--name", "a b"), hosts="a:2,b:2", wrap=True, max_restarts=3)
    assert (
        command_line(options) == "hvdtrain run -np 4 -H a:2,b:2 --wrap --max-restarts 3 train.py --name 'a b'"
    )
