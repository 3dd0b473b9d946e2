"""What all tests share: on several ranks only rank 0 reports, unless another rank has something to say."""

import os
import signal
import subprocess
import sys

import pytest
from runner.events import PIPE, Events

from hvdtrain import topology

PLACE = topology.detect()
RANK = PLACE.rank if PLACE else 0
# The fixtures that start ranks, hvdtrain, or a Python that loads TensorFlow.
JOBS = {"jobs", "scripts", "bench", "marked", "command", "environment"}

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# What this user has tuned for this machine is no part of what is tested.
os.environ["HVDTRAIN_TUNED"] = "off"


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Silences the progress of ranks other than 0; their failures still print, with their traceback."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts what it puts into the background so, and tests that interrupt jobs would wait in vain.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if PIPE in os.environ:
        config.pluginmanager.register(Events(os.environ.pop(PIPE), RANK), "events")
    worker = getattr(config, "workerinput", {})
    if PIPE in worker:
        Events(worker[PIPE], 1 + int(worker["workerid"].removeprefix("gw")))
    if RANK:
        reporter = config.pluginmanager.getplugin("terminalreporter")
        config.pluginmanager.unregister(reporter)
        config.pluginmanager.register(_OnlyFailures(), "only_failures")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the tests that start jobs through a fixture made for that; these files come first for two workers."""
    for item in items:
        if JOBS & set(item.fixturenames):
            item.add_marker(pytest.mark.jobs)
    if hasattr(config, "workerinput"):
        # Short files at the end keep both workers busy until then. The longest of all, of `wrap`, comes first.
        with_jobs = {item.path for item in items if item.get_closest_marker("jobs")}
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: (item.path not in with_jobs, -files.index(item.path)))


class _OnlyFailures:
    def pytest_runtest_logreport(self, report):
        if report.failed:
            print(f"\n[rank {RANK}] {report.nodeid} failed:\n{report.longreprtext}", flush=True)

    def pytest_collectreport(self, report):
        if report.failed:
            print(f"\n[rank {RANK}] {report.nodeid}: {report.longrepr}", flush=True)


@pytest.fixture(autouse=True)
def nothing_trained():
    """Forgets what a test has trained, and that a rank has joined: both decide what is compared over the ranks."""
    yield
    trained, runtime = map(sys.modules.get, ("hvdtrain.gradients.trained_variables", "hvdtrain.runtime"))
    if trained:
        trained.registry.clear()
    if runtime and runtime.is_initialized():
        runtime.engine().has_joined = False


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system needs root and mount")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(scope="session")
def engine():
    """The engine that HVDTRAIN_ENGINE names, in the world that launched these tests."""
    import hvdtrain.keras as hvd
    from hvdtrain import runtime

    hvd.init()
    return runtime.engine()


@pytest.fixture
def way(request, engine, monkeypatch):
    """The way given as parameter; "during backprop" sends each part while the next is computed."""
    monkeypatch.setattr(engine, "background", None)
    if request.param == "during backprop":
        from hvdtrain.collectives.overlap import BackgroundThread

        if engine.name != "mpi":
            pytest.skip("Horovod's core has its own thread")
        monkeypatch.setattr(engine, "background", BackgroundThread())
    return request.param


@pytest.fixture(scope="module", autouse=True)
def default_floats():
    """Leave the next file Keras' defaults: a policy that was first asked for while floats were float64 stays so."""
    yield
    if "keras" in sys.modules:
        import keras

        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
