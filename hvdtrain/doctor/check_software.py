"""Check Python, the settings of hvdtrain, TensorFlow and Keras."""

import sys
from collections.abc import Mapping

from hvdtrain import settings
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.probe_runner import ProbeError, ProbeRunner

OLDEST_PYTHON, OLDEST_TENSORFLOW, OLDEST_KERAS = (3, 10), "2.16", "3.3"


def python() -> Finding:
    """Check the Python that runs doctor, which is also the one that runs the training."""
    found = f"{sys.version.split()[0]} ({sys.executable})"
    if sys.version_info < OLDEST_PYTHON:
        fix = "python3.12 -m venv .venv   # and install hvdtrain there"
        return wrong("Python", f"{found}; hvdtrain needs 3.10 or later.", fix)
    return ok("Python", found)


def variables(environ: Mapping[str, str]) -> Finding:
    """Check the variables HVDTRAIN_… of the environment for names that hvdtrain does not know."""
    unknown = settings.unknown(environ)
    if unknown:
        return note("Settings", " ".join(unknown), f"unset {unknown[0].split()[0]}")
    names = [setting.name for setting in settings.SETTINGS if settings.is_set(setting.name, environ)]
    chosen = ", ".join(f"{name}={settings.get(name, environ)}" for name in names)
    return ok("Settings", chosen or "all have their defaults")


def tensorflow(probes: ProbeRunner) -> Finding:
    """Check that TensorFlow is installed, new enough, and can be imported."""
    try:
        stack = probes.stack
    except ProbeError as error:
        found = f"Importing it ended the process: {error}."
        return wrong("TensorFlow", found, "pip install --force-reinstall tensorflow-cpu")
    return judge_tensorflow(stack.get("tensorflow"), stack.get("tensorflow_error", ""))


def judge_tensorflow(version: str | None, error: str) -> Finding:
    """Judge TensorFlow by its version, or by the error that its import raised."""
    if version is None and "No module named 'tensorflow'" in error:
        found = "It is not installed for this Python."
        return wrong("TensorFlow", found, "pip install 'tensorflow-cpu>=2.16'")
    if version is None:
        found = f"It is installed but cannot be imported: {error}."
        return wrong("TensorFlow", found, "pip install --force-reinstall 'tensorflow-cpu>=2.16'")
    if _minor(version) < _minor(OLDEST_TENSORFLOW):
        found = f"{version} is here; hvdtrain needs {OLDEST_TENSORFLOW} or later, which come with Keras 3."
        return wrong("TensorFlow", found, "pip install --upgrade 'tensorflow-cpu>=2.16'")
    return ok("TensorFlow", version)


def keras(probes: ProbeRunner) -> Finding:
    """Check that Keras is Keras 3, new enough, and uses TensorFlow."""
    if probes.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
        found = "TF_USE_LEGACY_KERAS makes tf.keras Keras 2, whose optimizers hvdtrain does not support."
        return wrong("Keras", found, "unset TF_USE_LEGACY_KERAS")
    try:
        stack = probes.stack
    except ProbeError as error:
        return note("Keras", f"Not tried: with TensorFlow, {error}.")
    backend = stack.get("backend") or probes.environ.get("KERAS_BACKEND", "")
    return judge_keras(stack.get("keras"), backend, stack.get("keras_error", ""))


def judge_keras(version: str | None, backend: str, error: str) -> Finding:
    """Judge Keras by its version and its backend, or by the error that its import raised."""
    if version is None and "No module named 'keras'" in error:
        return wrong("Keras", "It is not installed for this Python.", "pip install 'keras>=3.3'")
    if version is None and backend not in ("", "tensorflow"):
        found = f"It cannot be imported with KERAS_BACKEND={backend}: {error}."
        return wrong("Keras", found, "export KERAS_BACKEND=tensorflow")
    if version is None:
        found = f"It is installed but cannot be imported: {error}."
        return wrong("Keras", found, "pip install 'tensorflow-cpu>=2.16' 'keras>=3.3'")
    if _minor(version) < _minor(OLDEST_KERAS):
        found = f"{version} is here; hvdtrain needs {OLDEST_KERAS} or later."
        return wrong("Keras", found, "pip install --upgrade 'keras>=3.3'")
    if backend != "tensorflow":
        found = f"{version} runs on {backend}; hvdtrain trains on its TensorFlow backend."
        return wrong("Keras", found, "export KERAS_BACKEND=tensorflow")
    return ok("Keras", f"{version} on {backend}")


def _minor(version: str) -> tuple[int, ...]:
    """Return major and minor version."""
    major, minor, *_ = [*version.split("."), "0"]
    return int(major), int(minor)
