"""`python -m hvdtrain.as_horovod old_script.py args...`, under horovodrun, mpirun, srun, or alone."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from hvdtrain import as_horovod, script, topology


def main(words: Sequence[str]) -> None:
    """Runs a script or a module in this process, with hvdtrain in the place of Horovod.

    Args:
        words: `script.py args...`, or `-m module args...`.
    """
    if not words or words[0] in ("-h", "--help") or list(words) == ["-m"]:
        sys.exit(
            "Expected a script: python -m hvdtrain.as_horovod old_script.py args..., or -m module args..."
        )
    if words[0] != "-m" and not Path(words[0]).is_file():
        print(
            f"hvdtrain: The script {words[0]} is not there (looked for from {Path.cwd()}).", file=sys.stderr
        )
        sys.exit(2)
    as_horovod.install()
    _show_what_is_the_users()
    script.run(words)


def _show_what_is_the_users() -> None:
    """Makes the traceback of an uncaught error begin in the script; advice comes once, from rank 0."""
    show = sys.excepthook
    place = topology.detect()

    def show_users_part(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        error.__traceback__ = script.users_part(error)
        show(kind, error, error.__traceback__)
        told = as_horovod.advice(error)
        if told and (place is None or place.rank == 0):
            print(f"\n{told}", file=sys.stderr)

    sys.excepthook = show_users_part


main(sys.argv[1:])
