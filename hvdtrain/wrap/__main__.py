"""`python -m hvdtrain.wrap [--scale-batch] train.py args...`, under hvdtrain run, mpirun, srun, or alone."""

from hvdtrain import safe_path

safe_path.leave_working_directory()

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from hvdtrain import script, topology
from hvdtrain.wrap import commands, files, import_hook, rank_output, refusals, script_end


def main(words: Sequence[str]) -> None:
    """Runs a script or a module in this process, as one of several ranks that do it together.

    Args:
        words: `script.py args...`, or `-m module args...`; before them perhaps `--scale-batch`.
    """
    scale_batch = words[:1] == ["--scale-batch"]
    words = words[1:] if scale_batch else words
    if not words or words[0] in ("-h", "--help") or list(words) == ["-m"]:
        sys.exit(
            "Expected a script: python -m hvdtrain.wrap [--scale-batch] train.py args..., or -m module args..."
        )
    if words[0] != "-m" and not Path(words[0]).is_file():
        print(
            f"hvdtrain: The script {words[0]} is not there (looked for from {Path.cwd()}).", file=sys.stderr
        )
        sys.exit(2)
    place = topology.detect()
    if place is not None and (place.size or 1) > 1:
        _hash_alike()
        _show_what_is_the_users()
        if place.rank:
            rank_output.install()
            files.install()
        else:
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # a job may end abruptly
        commands.install()
        refusals.install()
        import_hook.install(scale_batch)
    with script_end.in_step():
        refusals.run(words)


def _hash_alike() -> None:
    """Makes sets of words have the same order on all ranks, for which Python must be started anew."""
    if "PYTHONHASHSEED" not in os.environ and sys.orig_argv[1:3] == ["-m", "hvdtrain.wrap"]:
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, sys.orig_argv)


def _show_what_is_the_users() -> None:
    """Makes the traceback of an uncaught error begin in the script."""
    show = sys.excepthook

    def show_users_part(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        error.__traceback__ = script.users_part(error)
        show(kind, error, error.__traceback__)

    sys.excepthook = show_users_part


main(sys.argv[1:])
