"""Start a script with `python -m hvdtrain.as_horovod old_script.py args...`, alone or under a launcher."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from hvdtrain import as_horovod, script, topology


def main(arguments: Sequence[str]) -> None:
    """Run a script or a module in this process, with hvdtrain in the place of Horovod.

    Args:
        arguments: `script.py args...`, or `-m module args...`.
    """
    if not arguments or arguments[0] in ("-h", "--help") or list(arguments) == ["-m"]:
        sys.exit(
            "Expected a script: python -m hvdtrain.as_horovod old_script.py args..., or -m module args..."
        )
    if arguments[0] != "-m" and not Path(arguments[0]).is_file():
        print(
            f"hvdtrain: The script {arguments[0]} is not there (looked for from {Path.cwd()}).",
            file=sys.stderr,
        )
        sys.exit(2)
    as_horovod.install()
    _shorten_tracebacks()
    script.run(arguments)


def _shorten_tracebacks() -> None:
    """Make the traceback of an uncaught error begin in the script; rank 0 adds advice after it."""
    show = sys.excepthook
    place = topology.detect()

    def show_users_part(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        error.__traceback__ = script.users_part(error)
        show(kind, error, error.__traceback__)
        advice = as_horovod.advice(error)
        if advice and (place is None or place.rank == 0):
            print(f"\n{advice}", file=sys.stderr)

    sys.excepthook = show_users_part


main(sys.argv[1:])
