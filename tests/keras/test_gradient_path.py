"""The path of a gradient through the files of hvdtrain is the one that docs/architecture.md shows."""

import re
import traceback
from pathlib import Path

import keras
import numpy as np
import pytest

import hvdtrain
import hvdtrain.keras as hvd
from hvdtrain.backends.tensorflow import bridge

pytestmark = pytest.mark.ranks

PACKAGE = Path(hvdtrain.__file__).parent
DOCUMENTED = (PACKAGE.parent / "docs/architecture.md").read_text()


def documented(name):
    (block,) = re.findall(rf"```text {name}\n(.*?)```", DOCUMENTED, re.DOTALL)
    return block.split()


def files_on_the_stack():
    """Return the files of hvdtrain from the entry into the path to here, each as often as it is entered."""
    found = []
    for frame in traceback.extract_stack():
        path = Path(frame.filename)
        if frame.name == "_clip_gradients":
            found.clear()  # what Keras calls before it is not the path
        if path.is_relative_to(PACKAGE):
            name = str(path.relative_to(PACKAGE))
            if found[-1:] != [name]:
                found.append(name)
    return found


def recorded(monkeypatch, owner, name):
    """Record the files on the stack whenever a function is called."""
    original, stacks = getattr(owner, name), []

    def call(*args, **options):
        stacks.append(files_on_the_stack())
        return original(*args, **options)

    monkeypatch.setattr(owner, name, call)
    return stacks


def fit():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(30_000), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
    x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    start = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    model.fit(hvd.shard((x, x[:, :1]), batch_size=16), epochs=1, verbose=0, callbacks=[start])


def test_a_gradient_takes_the_documented_path(engine, monkeypatch):
    if engine.size == 1:
        pytest.skip("one rank reduces nothing")
    if engine.name == "horovod":
        combined = recorded(monkeypatch, type(engine.native_tensors()), "combine")
        fit()
        # The method of the engine's core would be the next file.
        assert [*combined[0], "collectives/horovod/engine.py"] == documented("horovod")
        return
    host_calls = recorded(monkeypatch, bridge, "on_host")
    reductions = recorded(monkeypatch, type(engine), "_reduce_all")
    fit()
    assert documented("trace") in host_calls
    running = [stack for stack in reductions if "gradients/exchange.py" in stack]
    assert running
    for stack in running:
        # The method of the engine would be the next file.
        assert [*stack, "collectives/mpi/engine.py"] == documented("mpi")
