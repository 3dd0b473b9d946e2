"""Python, TensorFlow and Keras: what a training script stands on."""

import sys

from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.inquiry import Inquiry, NoAnswerError

OLDEST_PYTHON, OLDEST_TENSORFLOW, OLDEST_KERAS = (3, 10), "2.16", "3.3"


def python() -> Finding:
    """Checks the Python that runs doctor, which is the one that will train."""
    found = f"{sys.version.split()[0]} ({sys.executable})"
    if sys.version_info < OLDEST_PYTHON:
        return wrong(
            "Python",
            f"{found}; hvdtrain needs 3.10 or later.",
            "python3.12 -m venv .venv   # and install hvdtrain there",
        )
    return ok("Python", found)


def tensorflow(inquiry: Inquiry) -> Finding:
    """Checks that TensorFlow is there, new enough, and can be imported."""
    try:
        stack = inquiry.stack
    except NoAnswerError as why:
        return wrong(
            "TensorFlow",
            f"Importing it ended the process: {why}.",
            "pip install --force-reinstall tensorflow-cpu",
        )
    return judge_tensorflow(stack.get("tensorflow"), stack.get("tensorflow_error", ""))


def judge_tensorflow(version: str | None, error: str) -> Finding:
    """Judges TensorFlow by its version, or by the error that its import raised."""
    if version is None and "No module named 'tensorflow'" in error:
        return wrong(
            "TensorFlow", "It is not installed for this Python.", "pip install 'tensorflow-cpu>=2.16'"
        )
    if version is None:
        found = f"It is installed but cannot be imported: {error}."
        return wrong("TensorFlow", found, "pip install --force-reinstall 'tensorflow-cpu>=2.16'")
    if older(version, OLDEST_TENSORFLOW):
        found = f"{version} is here; hvdtrain needs {OLDEST_TENSORFLOW} or later, which come with Keras 3."
        return wrong("TensorFlow", found, "pip install --upgrade 'tensorflow-cpu>=2.16'")
    return ok("TensorFlow", version)


def keras(inquiry: Inquiry) -> Finding:
    """Checks that Keras is Keras 3, new enough, and runs on TensorFlow."""
    if inquiry.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
        found = "TF_USE_LEGACY_KERAS makes tf.keras Keras 2, whose optimizers hvdtrain does not know."
        return wrong("Keras", found, "unset TF_USE_LEGACY_KERAS")
    try:
        stack = inquiry.stack
    except NoAnswerError as why:
        return note("Keras", f"Not tried: with TensorFlow, {why}.")
    backend = stack.get("backend") or inquiry.environ.get("KERAS_BACKEND", "")
    return judge_keras(stack.get("keras"), backend, stack.get("keras_error", ""))


def judge_keras(version: str | None, backend: str, error: str) -> Finding:
    """Judges Keras by its version and the backend in use or wanted, or by the error of its import."""
    if version is None and "No module named 'keras'" in error:
        return wrong("Keras", "It is not installed for this Python.", "pip install 'keras>=3.3'")
    if version is None and backend not in ("", "tensorflow"):
        found = f"It cannot be imported with KERAS_BACKEND={backend}: {error}."
        return wrong("Keras", found, "export KERAS_BACKEND=tensorflow")
    if version is None:
        mend = "pip install 'tensorflow-cpu>=2.16' 'keras>=3.3'"
        return wrong("Keras", f"It is installed but cannot be imported: {error}.", mend)
    if older(version, OLDEST_KERAS):
        found = f"{version} is here; hvdtrain needs {OLDEST_KERAS} or later."
        return wrong("Keras", found, "pip install --upgrade 'keras>=3.3'")
    if backend != "tensorflow":
        found = f"{version} runs on {backend}; hvdtrain trains on its TensorFlow backend."
        return wrong("Keras", found, "export KERAS_BACKEND=tensorflow")
    return ok("Keras", f"{version} on {backend}")


def older(version: str, oldest: str) -> bool:
    """Compares release numbers; what follows them, as in 2.21.0rc1, plays no part."""
    return _numbers(version) < _numbers(oldest)


def _numbers(version: str) -> tuple[int, ...]:
    major, minor, *_ = [*version.split("."), "0"]
    return int(major), int(minor)
