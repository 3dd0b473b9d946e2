"""Start a script with `python -m hvdtrain.wrap [--scale-batch] train.py args...`, alone or under a launcher."""

from hvdtrain import safe_path

safe_path.leave_working_directory()

import importlib
import os
import sys
from collections.abc import Sequence
from types import TracebackType

from hvdtrain import script, topology
from hvdtrain.patching import AfterImport
from hvdtrain.wrap import files, rank_zero, script_errors


def main(arguments: Sequence[str]) -> None:
    """Run a script or a module in this process, as one of several ranks that run it together.

    Args:
        arguments: `script.py args...` or `-m module args...`, optionally after `--scale-batch`.
    """
    scale_batch = arguments[:1] == ["--scale-batch"]
    arguments = arguments[1:] if scale_batch else arguments
    script.check_arguments("python -m hvdtrain.wrap [--scale-batch] train.py args...", arguments)
    place = topology.detect()
    if place is not None and (place.size or 1) > 1:
        _fix_hash_seed()
        script.shorten_tracebacks()
        if place.rank:
            _silence_output()
            files.install()
        else:
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # a job may end abruptly
        rank_zero.install()
        script_errors.reject_imports()
        _change_keras_after_import(scale_batch)
    script_errors.run(arguments)


def _fix_hash_seed() -> None:
    """Give sets of strings the same order on all ranks, for which Python must be started again."""
    if "PYTHONHASHSEED" not in os.environ and sys.orig_argv[1:3] == ["-m", "hvdtrain.wrap"]:
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, sys.orig_argv)


def _silence_output() -> None:
    """Discard the standard output and error of this rank, but still print an uncaught error."""
    sys.stdout.flush()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.close(devnull)
    os.environ.setdefault("MPLBACKEND", "Agg")
    stderr = sys.stderr
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - stays open until the process ends
    show = sys.excepthook

    def show_on_stderr(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr = stderr
        show(kind, error, trace)

    sys.excepthook = show_on_stderr


def _change_keras_after_import(scale_batch: bool) -> None:
    """Join the ranks and change Keras after the script has imported TensorFlow or Keras.

    Not before: the script may first set environment variables that Keras reads.
    """

    def change_keras() -> None:
        from hvdtrain.wrap import training  # loads Keras

        training.install(scale_batch)

    # TensorFlow may compute before the script imports Keras; by then the ranks must have divided the cores.
    sys.meta_path.insert(0, AfterImport("tensorflow", lambda: importlib.import_module("keras")))
    sys.meta_path.insert(0, AfterImport("keras", change_keras))
    if "keras" in sys.modules or "tensorflow" in sys.modules:  # Python may load them before any script
        importlib.import_module("keras")
        change_keras()


main(sys.argv[1:])
